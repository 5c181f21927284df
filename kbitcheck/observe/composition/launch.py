"""The parent's side of the processes of a composition: has them run, and compares what they recorded with one process alone."""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Raised, Unavailable
from kbitcheck.core.facts import FLOAT32_ULP, YARDSTICKS, CompositionFacts, Distance, ProcessFacts
from kbitcheck.core.machine import WORKER
from kbitcheck.observe.composition.kinds import ALONE, KINDS
from kbitcheck.observe.probes.step import distance
from kbitcheck.observe.unwatched.process import importable

SECONDS = 180.0  # for the processes of a composition
STARTING = 300.0  # to import what training takes, with a cold cache
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
WAITING = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/")  # where a rank is that waits for another one
Record = dict[str, Any]


class Server:
    """The process that forks those of compositions, for as long as this process lives."""

    def __init__(self) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        environment = {n: v for n, v in os.environ.items() if n != "TORCHDYNAMO_DISABLE"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kbitcheck.observe.composition.server", str(requests), str(replies)],
            pass_fds=(requests, replies),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environment, **WORKER, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )
        os.close(requests)
        os.close(replies)
        self._owner = os.getpid()
        self._seconds = STARTING
        atexit.register(self.close)

    @property
    def runs(self) -> bool:
        """Whether it can be asked."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, job: Mapping[str, Any]) -> list[dict[str, Any]]:
        """How the processes of a job ended."""
        os.write(self._requests, (json.dumps(job) + "\n").encode())
        unread = b""
        deadline = time.monotonic() + self._seconds + job["seconds"] * job["processes"]
        while not unread.endswith(b"\n"):
            ready = select.select([self._replies], [], [], max(deadline - time.monotonic(), 0))[0]
            chunk = os.read(self._replies, 1 << 16) if ready else b""
            if not chunk:
                self.close()
                raise Unavailable("the process that starts those of a composition ended or hung", failed=True)
            unread += chunk
        self._seconds = 0.0
        ended = json.loads(unread)
        if isinstance(ended, str):
            raise Unavailable(f"the model cannot be loaded in another process: {ended}", failed=True)
        return ended  # type: ignore[no-any-return]

    def close(self) -> None:
        """End it, and with it all that it started."""
        if self._owner != os.getpid() or self._requests < 0:
            return
        os.close(self._requests)
        self._requests = -1
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._replies)


_servers: list[Server] = []
# What one process alone gave, by case, by what is expected of it, and by implementation: compositions of one case share it.
_alone: OrderedDict[tuple[CaseSpec, str, Callable[..., Any]], Record] = OrderedDict()
KEPT = 6


def _server() -> Server:
    if not _servers or not _servers[-1].runs:
        _servers[:] = [Server()]
    return _servers[-1]


def composed(spec: CaseSpec, function: Callable[..., Any], fault: Callable[..., Any] | None = None) -> CompositionFacts:
    """A composition of what an implementation prepares, beside one process without it; ``fault`` spoils its processes."""
    place = asdict(importable(function))
    key = (_without(spec), KINDS[spec.composition].expects, function)
    spoilt = None if fault is None else {"module": fault.__module__, "file": "", "attribute": fault.__qualname__}
    with tempfile.TemporaryDirectory(prefix="kbitcheck-composition-") as name:
        root = Path(name)
        if key not in _alone:
            while len(_alone) >= KEPT:
                _alone.popitem(last=False)
            _alone[key] = _run(spec, place, ALONE, root, None)[0]
        alone = _alone[key]
        if "unavailable" in alone:
            raise Unavailable(alone["unavailable"], failed=alone["failed"], raised=alone["raised"])
        parts = _run(spec, place, spec.composition, root, spoilt)
        for part in parts:
            if "unavailable" in part and not part["failed"]:
                raise Unavailable(part["unavailable"])
    facts = [facts_of(part, alone) for part in _each(parts)]
    return CompositionFacts(kind=spec.composition, alone=facts_of(alone, alone), processes=tuple(facts))


def _run(spec: CaseSpec, place: Mapping[str, str], kind: str, root: Path, fault: Any) -> list[Record]:
    """The records of the processes of one kind."""
    folder = root / kind
    folder.mkdir()
    how = KINDS[kind]
    job = {
        "spec": _without(spec).as_json(),
        "function": place,
        "kind": kind,
        "expects": KINDS[spec.composition].expects,
        "folder": str(folder),
        "fault": fault,
        "processes": len(how.processes),
        "in_turn": how.in_turn,
        "seconds": SECONDS,
        "path": [entry for entry in sys.path if entry],
    }
    ended = {one["rank"]: one for one in _server().ask(job)}
    records = []
    for rank, name in enumerate(how.processes):
        record = {**_record(folder / f"{rank}.pt"), "name": name, "process": name}
        if rank not in ended:
            record["ended_by"] = how.processes[0]
        elif "ended" not in record:
            record |= _lost(ended[rank], folder / f"{rank}.log")
        records.append(record)
    return _blamed(records)


def _without(spec: CaseSpec) -> CaseSpec:
    return replace(spec, composition="")


def _record(file: Path) -> Record:
    return torch.load(file, weights_only=False) if file.exists() else {}


def _lost(ended: Mapping[str, Any], log: Path) -> Record:
    """What is said of a process that left no record."""
    printed, _, stack = (log.read_text(errors="replace") if log.exists() else "").partition(
        "Stack (most recent call first)"
    )
    last = printed.strip().splitlines()[-1:]
    said = f"; it last printed: {last[0]}" if last else ""
    if not ended["late"]:
        return {"raised": Raised("Lost", f"ended with exit code {ended['code']}{said}"), "ended": 0.0}
    frame = FRAME.search(stack)
    place = f", in {frame['name']} at {frame['file']}:{frame['line']}" if frame else ""
    waits = frame is not None and any(part in frame["file"] for part in WAITING)
    raised = Raised("Lost", f"did not end{place}{said}")
    return {"raised": raised, "ended": float("inf"), "waits": waits}


def _blamed(records: list[Record]) -> list[Record]:
    """Of several that were lost, those that only heard of the first are ended by it."""
    lost = sorted((r for r in records if r.get("raised")), key=lambda r: (r["ended"], r.get("waits", False)))
    for record in lost[1:]:
        raised = record["raised"]
        if record.get("waits") or "onnection" in raised.text or "gloo" in raised.text.lower():
            record["ended_by"], record["raised"] = lost[0]["name"], None
    return records


def _each(records: Sequence[Record]) -> list[Record]:
    """The records of processes and of the parts of a process."""
    return [part for record in records for part in record.get("parts") or [record]]


def facts_of(record: Mapping[str, Any], alone: Mapping[str, Any]) -> ProcessFacts:
    """A record as plain data."""
    gradients, resembles = {}, {}
    for name, gradient in record.get("gradients", {}).items():
        expected = alone["gradients"].get(name)
        yardstick = max(distance(alone["rounded"].get(name), expected), _ulp_of_cast(gradient, expected))
        gradients[name] = Distance(
            equal=_equal(gradient, expected), relative=distance(gradient, expected), yardstick=yardstick
        )
        resembles[name] = _resembles(name, gradient, alone)
    return ProcessFacts(
        name=record["name"],
        raised=record.get("raised"),
        ended_by=record.get("ended_by", ""),
        gradients=gradients,
        resembles={name: text for name, text in resembles.items() if text},
        numbers=record.get("numbers", {}),
        changed=tuple(n for n in record.get("changed", ()) if record is alone or n not in alone["changed"]),
        runs=record.get("runs", {}),
        reentrant=tuple(record.get("reentrant", ())),
        units=record.get("units", {}),
        outside=tuple(record.get("outside", ())),
        frozen=tuple(record.get("frozen", ())),
        passes=tuple(record.get("passes", ())),
        saved_behind=record.get("saved_behind", 0),
    )


def _ulp_of_cast(gradient: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The ulp of the dtype to which a trainer cast an adapter, as TRL does: its numbers and gradients are rounded to it."""
    if gradient is None or expected is None or gradient.dtype == expected.dtype:
        return 0.0
    return float(torch.finfo(gradient.dtype).eps)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return not any(bool(t.any()) for t in (one, other) if t is not None)
    return one.dtype == other.dtype and torch.equal(one, other)


def _resembles(name: str, gradient: torch.Tensor | None, alone: Mapping[str, Any]) -> str:
    """What a gradient is, if it is not the expected one."""
    expected = alone["gradients"].get(name)
    if gradient is None or expected is None or _equal(gradient, expected):
        return ""
    bound = YARDSTICKS * max(distance(alone["rounded"].get(name), expected), FLOAT32_ULP)
    adapter, _, number = name.rpartition(" (step ")
    each = alone.get("each", ())
    for rank, one in enumerate(each[int(number.rstrip(")")) - 1] if each else ()):
        if distance(gradient, one.get(adapter)) <= bound:
            return f"that of the batch of rank {rank} alone"
    for times in (2.0, 0.5, 4.0, 0.25):
        if distance(gradient, times * expected) <= bound:
            return f"{times:g} times the expected one"
    return ""
