"""Environments for what is not installed here: built once, kept in a cache, each with its own transformers.

An environment is a bare virtual environment with the subject in it. What else it needs it takes from where
``kbitcheck`` itself runs, torch and bitsandbytes always: those directories come last on its path, so that whatever
the subject brings stands before them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kbitcheck.core.errors import Lost, UsageError
from kbitcheck.core.events import Broken, WrongUsage
from kbitcheck.run import requirements as requirement
from kbitcheck.run.requests import Load
from kbitcheck.run.requirements import Requirement
from kbitcheck.run.worker_process import WorkerProcess

VARIABLE = "KBITCHECK_CACHE"
SHARED = ("torch", "bitsandbytes", "kbitcheck", "kbitcheck_reference")
PINNED = ("torch", "bitsandbytes")
# Built for one torch each, of which an index may hold another build than the torch that is here.
TIED_TO_TORCH = ("torchvision", "torchaudio", "xformers")
# Tried in this order after the transformers that is installed: the last release of each line that kbitcheck runs on.
OLDER_TRANSFORMERS = ("4.57.6", "4.56.2")
LOAD_SECONDS = 300.0  # importing two stacks with a cold cache
LAYOUT = 2  # of what is in an environment; a new number makes new ones
TOLD = "kbitcheck.json"


@dataclass(frozen=True, slots=True)
class Environment:
    """A built environment: its interpreter, and the transformers that was chosen for it."""

    folder: Path
    transformers: str

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(_python(self.folder))


def cache() -> Path:
    """Where environments are kept: ``$KBITCHECK_CACHE``, or the user's cache directory."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser().absolute() / "environments"
    import platformdirs

    return platformdirs.user_cache_path("kbitcheck") / "environments"


def interpreter(implementation: str, say: Callable[[str], None] = lambda line: None) -> str:
    """The Python that runs an implementation: this one, or that of an environment, which is built where there is none.

    ``say`` is told, in a line, of what takes long.

    Raises:
        UsageError: the requirement cannot be installed, or its function cannot be imported beside any transformers.
    """
    wanted = requirement.parse(implementation)
    return sys.executable if wanted is None else ready(wanted, say).python


def ready(wanted: Requirement, say: Callable[[str], None] = lambda line: None) -> Environment:
    """The environment of a requirement, built where there is none.

    Raises:
        UsageError: it cannot be built.
    """
    wanted.validate()
    folder = cache() / f"{wanted.project or 'subject'}-{_key(wanted)}"
    if (found := _read(folder)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), lambda: say(f"another process is installing {wanted.text}")):
            if (found := _read(folder)) is None:
                say(f"installing {wanted.text} into an environment of its own, once")
                found = _build(wanted, folder)
    except OSError as error:
        raise UsageError(f"{wanted.text} cannot be installed in {folder.parent}: {error}") from error
    return found


class Refused(Exception):
    """The subject does not go with this transformers; another may do."""


class Conflict(Refused):
    """It says itself that it does not, and so which one does."""


def _build(wanted: Requirement, folder: Path) -> Environment:
    """Build beside the place and move there when all is done: an environment is whole, or is not there."""
    draft = folder.with_suffix(".draft")
    for old in (draft, folder):
        shutil.rmtree(old, ignore_errors=True)
    refused: list[str] = []
    todo = _candidates()
    try:
        while todo:
            asked = todo.pop(0)
            try:
                _furnish(wanted, draft, asked)
            except Refused as error:
                if isinstance(error, Conflict):
                    # Its own requirements decide: whichever they allow, or none.
                    todo = [""] if asked else []
                refused.append(f"transformers {asked or 'of its own choice'}: {error}")
                continue
            transformers = asked or _chosen(draft)
            told = {"requirement": wanted.text, "function": wanted.function, "transformers": transformers}
            (draft / TOLD).write_text(json.dumps({**told, "refused": refused}, indent=1) + "\n", encoding="utf-8")
            draft.rename(folder)
            return Environment(folder, transformers)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    raise UsageError(f"{wanted.text} goes with no transformers that kbitcheck runs on: {'; '.join(refused)}")


def _furnish(wanted: Requirement, draft: Path, transformers: str) -> None:
    """Install the subject and a transformers, and load the function once.

    Raises:
        Refused: not beside this transformers.
        UsageError: not at all.
    """
    venv.create(draft, with_pip=False, clear=True)
    (_packages(draft) / requirement.PARENT).write_text("\n".join(parents()) + "\n", encoding="utf-8")
    pins = draft / "constraints.txt"
    held = {name: _version(name) for name in PINNED}
    lines = [f"{name}=={version}" for name, version in held.items() if version]
    pins.write_text("\n".join([*lines, f"transformers>={OLDER_TRANSFORMERS[-1]}", ""]), encoding="utf-8")
    _install(wanted, draft, [f"transformers=={transformers}"] if transformers else [])
    _load(wanted, draft)


def _install(wanted: Requirement, draft: Path, beside: Sequence[str]) -> None:
    python = _python(draft)
    held = ["--constraint", str(draft / "constraints.txt")]
    if uv := shutil.which("uv"):
        # uv does not see what is on the path, only what is in the environment.
        spared = draft / "overrides.txt"
        names = (*PINNED, *TIED_TO_TORCH)
        spared.write_text("".join(f"{name}; python_version < '3'\n" for name in names), encoding="utf-8")
        uses = [uv, "pip", "install", "--quiet", "--python", str(python), "--overrides", str(spared), *held]
        return _succeed(wanted, [*uses, wanted.pip, *beside])
    if importlib.util.find_spec("pip") is None:
        raise UsageError("to install a subject kbitcheck needs uv, or pip in its own environment")
    options = ["--disable-pip-version-check", "--no-input", "--no-warn-conflicts", "--no-compile", *held]
    uses = [sys.executable, "-m", "pip", "--python", str(python), "install", *options]
    if wanted.project and not _version(wanted.project):
        return _succeed(wanted, [*uses, wanted.pip, *beside])
    # pip takes what is on the path for installed: the subject itself must be in the environment in any case.
    _succeed(wanted, [*uses, "--no-deps", "--ignore-installed", wanted.pip])
    [subject] = metadata.distributions(path=[str(_packages(draft))])
    extras = re.fullmatch(r"[^\[]*(\[[^\]]*\])?.*", wanted.text)
    named = f"{subject.name}{(extras and extras[1]) or ''}=={subject.version}"
    return _succeed(wanted, [*uses, named, *beside])


def _succeed(wanted: Requirement, words: Sequence[str]) -> None:
    """Run an installer.

    Raises:
        Conflict: transformers is in the way.
        UsageError: it fails for another reason.
    """
    code, printed = _run(words)
    if code == 0:
        return
    told = _complaint(printed) or f"the installer ended with {code}"
    if "transformers" in told and not any(f"constraint) {name}" in told for name in PINNED):
        raise Conflict(told)
    raise UsageError(f"{wanted.text} cannot be installed: {told}")


def _complaint(printed: str) -> str:
    """What an installer says is wrong, on one line."""
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    if "The conflict is caused by:" in lines:  # pip
        causes = lines[lines.index("The conflict is caused by:") + 1 :]
        end = next((i for i, line in enumerate(causes) if not re.search("depends on|requested|installed", line)), None)
        return ", ".join(causes[:end])
    if lines and lines[0].startswith("×"):  # uv
        return " ".join(lines[1:]).lstrip("╰─▶ ")
    return next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")), "".join(lines[-1:]))


def _run(words: Sequence[str]) -> tuple[int, str]:
    """The exit code of a program and what it printed; ends it, and what it started, when this process is interrupted."""
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            printed, _ = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, printed


def _load(wanted: Requirement, draft: Path) -> None:
    """Load the function in the environment, as a run will."""
    text = f"{wanted.text}{requirement.SEPARATOR}{wanted.function}"
    scratch = draft / "scratch"
    scratch.mkdir()
    worker = WorkerProcess(scratch, python=str(_python(draft)))
    try:
        for event in worker.ask(Load(implementation=text, device="cpu", seed=0), LOAD_SECONDS):
            if isinstance(event, WrongUsage):
                raise (UsageError if event.missing else Refused)(event.message)
            if isinstance(event, Broken):
                raise Refused(event.cause)
    except Lost as lost:
        raise Refused(str(lost)) from lost
    finally:
        worker.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _candidates() -> list[str]:
    """The transformers to try, newest first."""
    return list(dict.fromkeys([_version("transformers"), *OLDER_TRANSFORMERS]))


def _chosen(folder: Path) -> str:
    """The transformers that an environment brings, or sees."""
    own = metadata.distributions(name="transformers", path=[str(_packages(folder))])
    return next((found.version for found in own), _version("transformers"))


def parents() -> list[str]:
    """The directories where kbitcheck, its oracle and the stack are imported from here; imports none of them."""
    found = []
    for name in SHARED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            file = Path(spec.origin)
            found.append(str(file.parents[1] if spec.submodule_search_locations else file.parent))
    return list(dict.fromkeys(found))


def _key(wanted: Requirement) -> str:
    what = (
        LAYOUT, wanted.text if wanted.path is None else str(wanted.path), wanted.content(), wanted.function,
        platform.python_version(), sys.prefix, parents(), _candidates(), [_version(name) for name in PINNED],
    )  # fmt: skip
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()


def _read(folder: Path) -> Environment | None:
    """A built environment, if it is there and its interpreter still is."""
    try:
        told = json.loads((folder / TOLD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Environment(folder, told["transformers"]) if _python(folder).exists() else None


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that the system drops when its holder dies; ``waiting`` is called where another holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python*")) / "site-packages"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
