"""Runs ``steps.py`` under another name in a process that cannot tell who started it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import Passes, UnwatchedFacts
from kbitcheck.core.machine import WORKER
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import switches
from kbitcheck.observe.probes.call import arguments
from kbitcheck.observe.unwatched import steps

OWN = "kbitcheck"
NEUTRAL = b"finetunes"  # as long as the name that it stands for: a pickle counts letters
SECONDS = 300.0
UNWATCHED = Passes(forwards=2 * steps.STEPS, backwards=steps.STEPS, copies=3)  # in this process


@dataclass(frozen=True, slots=True)
class Importable:
    """Where another process finds a function."""

    module: str
    file: str
    attribute: str


def importable(function: Any) -> Importable:
    """Where another process finds a function; raises ``Unavailable`` if it does not."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    attribute, file = getattr(function, "__qualname__", ""), getattr(module, "__file__", None)
    item: Any = module
    for name in attribute.split("."):
        item = getattr(item, name, None)
    if file is None or item is not function or module is None:
        raise Unavailable("no other process can import the implementation: it is no function of a module")
    return Importable(module.__name__, str(file), attribute)


def unwatched(preparation: Preparation, other: Loaded) -> UnwatchedFacts:
    """The case in this process, and in two others, where it is the first model, and the second after the ``other``."""
    place, loaded = importable(preparation.function), preparation.loaded
    passed = arguments(preparation.function, preparation.keywords)
    here = steps.prepared(preparation.function, _base(loaded), passed)[1]
    with _folder() as folder:
        if place.module.startswith(OWN):
            place = _renamed(place, folder)
        for file, base in (("a.pkl", loaded), ("b.pkl", other)):
            with _as_of_a_user(_base(base), folder / f"model-{file[0]}") as renamed:
                (folder / file).write_bytes(pickle.dumps(renamed).replace(OWN.encode(), NEUTRAL))
        job = {
            **asdict(place),
            "path": [str(folder), *(entry for entry in sys.path if entry)],
            "bases": [str(folder / "a.pkl"), str(folder / "b.pkl")],
            "orders": [[0, 1], [1, 0]],
            "arguments": passed,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(folder)
        first, second = (_answer(folder / f"job.json.{number}") for number in (0, 1))
    alone, after, kept, now = first
    return UnwatchedFacts(
        here=here, alone=alone, second=second[1], other=second[0], other_second=after, kept=kept, kept_after=now
    )


def _base(loaded: Loaded) -> Mapping[str, Any]:
    model = loaded.copy()
    return {"model": model, "targets": loaded.targets, "batch": _fed(model, loaded.single)}


@contextmanager
def _as_of_a_user(base: Mapping[str, Any], link: Path) -> Iterator[Mapping[str, Any]]:
    """The base with a checkpoint's path that is relative, as people write it: that of a temporary folder would tell."""
    model: Any = base["model"]
    named = [
        (item, name) for item, name in ((model, "name_or_path"), (model.config, "_name_or_path")) if hasattr(item, name)
    ]
    checkpoint = Path(getattr(model.config, "_name_or_path", None) or "")
    if not (checkpoint.is_absolute() and checkpoint.is_dir()):
        yield base
        return
    link.symlink_to(checkpoint)  # the process runs in the link's folder
    with switches.attributes(*((item, name, link.name) for item, name in named)):
        yield base


def _fed(model: Any, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    from kbitcheck.observe.probes.step import feed

    return {name: tensor.clone() for name, tensor in feed(model, batch).items()}


@contextmanager
def _folder() -> Any:
    """A new directory whose path does not name this package, removed afterwards."""
    root = Path(tempfile.gettempdir())
    while OWN in str(root):
        root = root.parent
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=root))
    try:
        shutil.copy(Path(steps.__file__), folder / "steps.py")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _renamed(place: Importable, folder: Path) -> Importable:
    """A function of this package's own, as that of a copy of its folder under another name."""
    package, _, stem = place.module.rpartition(".")
    source = Path(place.file).parent
    for file in source.rglob("*.py"):
        copied = folder / "subject" / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(file.read_text(encoding="utf-8").replace(package, "subject"), encoding="utf-8")
    return Importable(f"subject.{stem}", str(folder / "subject" / f"{stem}.py"), place.attribute)


def _run(folder: Path) -> None:
    """Run the copied script to its end, as a child of nobody: its parent would tell."""
    telling = {n for n, v in os.environ.items() if OWN in f"{n}={v}".lower() or WORKER.get(n) == v}
    environment = {n: v for n, v in os.environ.items() if n not in telling}
    command = [sys.executable, "-P", "steps.py", "job.json"]
    shell = ["/bin/sh", "-c", '"$@" > log 2>&1 & echo $!', "sh", *command]
    started = subprocess.run(shell, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    child, deadline = int(started.stdout), time.monotonic() + SECONDS
    while _lives(child):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.kill(child, 9)
            raise Unavailable(
                f"a process with nothing but the implementation took longer than {SECONDS:g} s", failed=True
            )
        time.sleep(0.05)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    with suppress(OSError):
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return not Path("/proc/self").exists()


def _answer(file: Path) -> Sequence[Mapping[str, str]]:
    if not file.exists():
        log = file.with_name("log").read_text(errors="replace").strip().splitlines()[-1:]
        raise Unavailable(
            f"a process with nothing but the implementation ended: {''.join(log) or 'silently'}", failed=True
        )
    answer = json.loads(file.read_text(encoding="utf-8"))
    if "raised" in answer:
        raise Unavailable(
            f"in a process with nothing but it, the implementation raised {answer['raised']}", failed=True
        )
    if naming := [name for name in answer["names"] if OWN in name.lower()]:
        raise Unavailable(f"this Python names {OWN} itself: {naming[0]}")
    digests: Sequence[Mapping[str, str]] = answer["digests"]
    return digests
