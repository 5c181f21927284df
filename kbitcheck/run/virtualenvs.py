"""Environments for what is not installed here: built once, kept in a cache, each with its own transformers.

An environment is a bare virtual environment with the subject in it. What else it needs it takes from where
``kbitcheck`` itself runs, torch and bitsandbytes always: those directories come last on its path, so that whatever
the subject brings stands before them.
"""

import contextlib
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
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from kbitcheck.core import machine
from kbitcheck.core.errors import Lost, UsageError
from kbitcheck.core.events import Broken, WrongUsage
from kbitcheck.run import requirements
from kbitcheck.run.requests import Load
from kbitcheck.run.requirements import Requirement
from kbitcheck.run.worker_process import WorkerProcess

SHARED = ("torch", "bitsandbytes", "kbitcheck", "kbitcheck_reference")
PINNED = ("torch", "bitsandbytes")
# Built for one torch each, of which an index may hold another build than the torch that is here.
TIED_TO_TORCH = ("torchvision", "torchaudio", "xformers")
# Tried in this order after the transformers that is installed: the last release of each line that kbitcheck runs on.
OLDER_TRANSFORMERS = ("4.57.6", "4.56.2")
LOAD_SECONDS = 300.0  # importing two stacks with a cold cache
LAYOUT = 2  # of what is in an environment; a new number makes new ones
RECORD = "kbitcheck.json"


def cache() -> Path:
    """Where environments are kept: ``$KBITCHECK_CACHE``, or the user's cache directory."""
    if directory := os.environ.get("KBITCHECK_CACHE"):
        return Path(directory).expanduser().absolute() / "environments"
    import platformdirs

    return platformdirs.user_cache_path("kbitcheck") / "environments"


def interpreter(implementation: str, say: Callable[[str], None] = lambda line: None) -> str:
    """The Python that runs an implementation: this one, or that of an environment, which is built where there is none.

    ``say`` gets a line where something takes long.
    """
    requirement = requirements.parse(implementation)
    return sys.executable if requirement is None else str(_python(_ready(requirement, say)))


def _ready(requirement: Requirement, say: Callable[[str], None]) -> Path:
    """The folder of a requirement's environment, which is built where there is none."""
    requirement.validate()
    folder = cache() / f"{requirement.project or 'subject'}-{_key(requirement)}"
    if _is_built(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock"), lambda: say(f"another process is installing {requirement.text}")):
            if not _is_built(folder):
                say(f"installing {requirement.text} into an environment of its own, once")
                _build(requirement, folder)
    except OSError as error:
        raise UsageError(f"{requirement.text} cannot be installed in {folder.parent}: {error}") from error
    return folder


class Refused(Exception):
    """The implementation cannot be imported beside this transformers; another version may do."""


class Conflict(Refused):
    """The implementation's own requirements exclude this transformers, and so say which version they allow."""


def _build(requirement: Requirement, folder: Path) -> None:
    """Build beside the place and move there when all is done: an environment is whole, or is not there."""
    draft = folder.with_suffix(".draft")
    for old in (draft, folder):
        shutil.rmtree(old, ignore_errors=True)
    refused: list[str] = []
    todo = [""] if requirement.beside else _candidates()
    try:
        while todo:
            version = todo.pop(0)
            try:
                _furnish(requirement, draft, version)
            except Refused as error:
                if isinstance(error, Conflict):
                    # Its own requirements decide: whichever they allow, or none.
                    todo = [""] if version else []
                refused.append(f"transformers {version or 'of its own choice'}: {error}")
                continue
            record = {
                "requirement": requirement.text,
                "function": requirement.function,
                "transformers": version or _chosen(draft),
                "refused": refused,
            }
            (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            draft.rename(folder)
            return
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    raise UsageError(
        f"{requirement.text} is incompatible with every transformers version that kbitcheck supports: "
        f"{'; '.join(refused)}"
    )


def _furnish(requirement: Requirement, draft: Path, transformers: str) -> None:
    """Install the subject and a transformers, and load the function once; ``Refused`` where another one may do."""
    venv.create(draft, with_pip=False, clear=True)
    (_packages(draft) / requirements.PARENT).write_text("\n".join(parents()) + "\n", encoding="utf-8")
    pins = draft / "constraints.txt"
    held = {name: machine.version(name) for name in PINNED}
    lines = [f"{name}=={version}" for name, version in held.items() if version]
    pins.write_text("\n".join([*lines, f"transformers>={OLDER_TRANSFORMERS[-1]}", ""]), encoding="utf-8")
    for name in requirement.stand_ins:
        (_packages(draft) / f"{name}.py").touch()
    _install(requirement, draft, [f"transformers=={transformers}"] if transformers else [])
    _load(requirement, draft)


def _install(requirement: Requirement, draft: Path, beside: Sequence[str]) -> None:
    python = _python(draft)
    held = ["--constraint", str(draft / "constraints.txt")]
    if uv := shutil.which("uv"):
        # uv does not see what is on the path, only what is in the environment.
        spared = draft / "overrides.txt"
        names = (*PINNED, *TIED_TO_TORCH)
        spared.write_text("".join(f"{name}; python_version < '3'\n" for name in names), encoding="utf-8")
        uses = [uv, "pip", "install", "--quiet", "--python", str(python), "--overrides", str(spared), *held]
        alone = ["--no-deps", *requirement.beside] if requirement.beside else []
        return _succeed(requirement, [*uses, *alone, requirement.pip, *beside])
    if not machine.version("pip"):
        raise UsageError("to install a subject kbitcheck needs uv, or pip in its own environment")
    options = ["--disable-pip-version-check", "--no-input", "--no-warn-conflicts", "--no-compile", *held]
    uses = [sys.executable, "-m", "pip", "--python", str(python), "install", *options]
    if requirement.beside:
        alone = ["--no-deps", "--ignore-installed", *requirement.beside]
        return _succeed(requirement, [*uses, *alone, requirement.pip])
    if requirement.project and not machine.version(requirement.project):
        return _succeed(requirement, [*uses, requirement.pip, *beside])
    # pip takes what is on the path for installed: the subject itself must be in the environment in any case.
    _succeed(requirement, [*uses, "--no-deps", "--ignore-installed", requirement.pip])
    [subject] = metadata.distributions(path=[str(_packages(draft))])
    extras = re.fullmatch(r"[^\[]*(\[[^\]]*\])?.*", requirement.text)
    named = f"{subject.name}{(extras and extras[1]) or ''}=={subject.version}"
    return _succeed(requirement, [*uses, named, *beside])


def _succeed(requirement: Requirement, words: Sequence[str]) -> None:
    """Run an installer; ``Conflict`` where it fails because transformers is in the way."""
    code, printed = _run(words)
    if code == 0:
        return
    complaint = _complaint(printed) or f"the installer ended with {code}"
    # Installers report conflicts in prose alone.
    if "transformers" in complaint and not any(f"constraint) {name}" in complaint for name in PINNED):
        raise Conflict(complaint)
    raise UsageError(f"{requirement.text} cannot be installed: {complaint}")


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


def _load(requirement: Requirement, draft: Path) -> None:
    """Load the function in the environment, as a run will."""
    text = f"{requirement.text}{requirements.SEPARATOR}{requirement.function}"
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
    return list(dict.fromkeys([machine.version("transformers"), *OLDER_TRANSFORMERS]))


def _chosen(folder: Path) -> str:
    """The transformers that an environment brings, or sees."""
    own = metadata.distributions(name="transformers", path=[str(_packages(folder))])
    return next((one.version for one in own), machine.version("transformers"))


def parents() -> list[str]:
    """The directories where kbitcheck, its oracle and the stack are imported from here; imports none of them."""
    directories = []
    for name in SHARED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            file = Path(spec.origin)
            directories.append(str(file.parents[1] if spec.submodule_search_locations else file.parent))
    return list(dict.fromkeys(directories))


def _key(requirement: Requirement) -> str:
    parts = (
        LAYOUT, requirement.text if requirement.path is None else str(requirement.path), requirement.content(), requirement.function,
        requirement.beside, requirement.stand_ins,
        platform.python_version(), sys.prefix, parents(), _candidates(), [machine.version(name) for name in PINNED],
    )  # fmt: skip
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _is_built(folder: Path) -> bool:
    """True where an environment is whole and its interpreter is still there."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "transformers" in record and _python(folder).exists()


def _lock(path: Path, waiting: Callable[[], None]) -> contextlib.AbstractContextManager[object]:
    """A lock that the system drops when its holder dies; ``waiting`` is called where another holds it."""
    lock = FileLock(path)
    with contextlib.suppress(Timeout):
        return lock.acquire(blocking=False)
    waiting()
    return lock.acquire()


def _packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python*")) / "site-packages"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
