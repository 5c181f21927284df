"""``kbitcheck completion``."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kbitcheck.cli.options import argument, choice, option
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.report.output_file import OutputFile

SHELLS = ("bash", "zsh", "fish")
HUB_PREFIX = "models--"


@dataclass(frozen=True, kw_only=True)
class Options:
    shell: str = argument("[bash|zsh|fish]", "The shell.", default="", nargs="?")
    words: str = choice("Print words that change from day to day; the script calls this.", "", ("models",))
    debug: bool = option("Show tracebacks.", False)


def run(options: Options) -> int:
    """Print the script of a shell, or the words that it asks for."""
    if options.words:
        OutputFile("").write("".join(f"{name}\n" for name in models()))
        return EXIT_CONFORMS
    if options.shell not in SHELLS:
        hint = did_you_mean(options.shell, SHELLS)
        raise UsageError(f"which shell? write kbitcheck completion {'|'.join(SHELLS)}{hint}")
    from kbitcheck.cli.completion import bash, fish, zsh  # which imports every command

    scripts: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
    OutputFile("").write(scripts[options.shell]())
    return EXIT_CONFORMS


def models() -> Iterator[str]:
    """The models of the hub's cache on this machine. The hub's own library takes long to import."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    if cache.is_dir():
        names = (path.name for path in cache.iterdir() if path.name.startswith(HUB_PREFIX))
        yield from sorted(name.removeprefix(HUB_PREFIX).replace("--", "/", 1) for name in names)
