"""Runs a user's command with the watcher inside, and gathers the reports of its processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kbitcheck.core.errors import UsageError
from kbitcheck.run.inject import __file__ as inject

if TYPE_CHECKING:
    from kbitcheck.core.report import Report
    from kbitcheck.run.ranks import Rank

VARIABLE = "KBITCHECK_WATCH"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores these, and a command would inherit that
PAUSE = 0.25  # seconds between looks for reports


class Ended(NamedTuple):
    """How a command ended: its exit code as a shell has it, the report, if any, and why there is none, on one line each."""

    code: int
    report: Report | None
    failed: str = ""


def run(command: Sequence[str], settings: Mapping[str, Any], *, on_report: Callable[[Report], None]) -> Ended:
    """Run a command unchanged. ``on_report`` gets the report when every process has taken its steps, or at the end.

    ``settings`` are the values of ``Settings``, which only a report needs.

    Raises:
        UsageError: the command cannot be run.
    """
    with _scratch() as folder:
        process = _Process(command, _environment(folder, settings))
        shown = False
        with _forwarding(process.pid):
            while not process.ends_within(PAUSE):
                if not shown and (ranks := _written(folder)) and len(ranks) >= ranks[0].ranks:
                    shown = True
                    on_report(_merged(ranks, settings))
        report = _merged(ranks, settings) if (ranks := _written(folder)) else None
        failed = "; ".join({path.read_text(encoding="utf-8"): None for path in sorted(folder.glob("failed-*"))})
    if report is not None and not report.results:
        report = None
    if report is not None and not shown:
        on_report(report)
    return Ended(process.code, report, failed)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A new directory that only this user reads. ``tempfile`` does the same and takes longer to import than the command to start."""
    named = filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP")))
    usable = [each for each in (*named, os.sep + "tmp", os.curdir) if os.access(each, os.W_OK | os.X_OK)]
    if not usable:
        raise UsageError("no directory for temporary files can be written to: set TMPDIR")
    folder = Path(usable[0]).absolute() / f"kbitcheck-watch-{os.urandom(8).hex()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _written(folder: Path) -> list[Rank]:
    """The processes that have written a report."""
    if not any(folder.glob("*.json")):  # a script without a quantized model pays for no import of reports
        return []
    from kbitcheck.run import ranks

    return ranks.read(folder)


def _merged(ranks: Sequence[Rank], settings: Mapping[str, Any]) -> Report:
    from kbitcheck.run.ranks import merged
    from kbitcheck.run.watch_settings import Settings

    return merged(ranks, Settings(**settings))


class _Process:
    """A command that runs. ``subprocess`` does the same and takes longer to import than the command to start."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        try:
            self.pid = os.posix_spawnp(command[0], list(command), environment, setsigdef=DEFAULT)
        except OSError as error:
            raise UsageError(f"cannot run {command[0]}: {error.strerror}") from None
        self.code = 0
        # A wait with a timeout would have to look again and again, and see the end late.
        self._end = threading.Thread(target=self._wait, daemon=True)
        self._end.start()

    def _wait(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.code = 128 - code if code < 0 else code

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end so long; whether it has come."""
        self._end.join(seconds)
        return not self._end.is_alive()


def _environment(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The command's environment: as it is, with the watcher on Python's path."""
    # To import the second one would import torch.
    specs = (importlib.util.find_spec(name) for name in ("kbitcheck", "kbitcheck_reference"))
    paths = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin]
    options = {
        "folder": str(folder),
        "settings": settings,
        "paths": list(dict.fromkeys(paths)),
    }
    own = str(Path(inject).parent)
    path = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, VARIABLE: json.dumps(options)}


@contextlib.contextmanager
def _forwarding(process: int) -> Iterator[None]:
    """Pass signals on to the command. Ctrl-C on a terminal reaches the command by itself."""

    def forward(number: int, frame: object) -> None:
        if number != signal.SIGINT or not os.isatty(0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    before = {each: signal.signal(each, forward) for each in FORWARDED if signal.getsignal(each) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
