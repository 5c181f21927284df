"""Audits every architecture of the installed transformers: one row each, several workers at once. No torch here."""

from __future__ import annotations

import contextlib
import fnmatch
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.compare.sweep import Finding, Row, Table, row
from kbitcheck.core import machine
from kbitcheck.core.cases import CaseSpec, Checkpointing, Profile
from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import rules
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.core.version import VERSION
from kbitcheck.run import requirements
from kbitcheck.run import subject as implementations
from kbitcheck.run.sweep.journal import Journal
from kbitcheck.run.sweep.workers import architectures, examine

__all__ = ["Finding", "Row", "SweepRequest", "Table", "row", "shard", "swept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """The architectures of ``task`` that ``select`` and the part leave, and how each is audited.

    ``part`` counts from 1; ``timeout`` is in seconds for each architecture; rows are kept in ``output`` + ``.jsonl``,
    unless ``output`` is empty; ``command`` is the command that gives the same table again.
    """

    task: str
    select: Sequence[str]
    quant: str
    checkpointing: Checkpointing
    prepare: str
    profile: Profile
    device: str
    seed: int
    jobs: int
    timeout: float
    part: int
    parts: int
    output: str
    command: str


def shard(names: Iterable[str], index: int, total: int) -> Iterator[str]:
    """Every ``total``-th name from the ``index``-th (from 1) on: neighbours, which are alike, go to different shards."""
    return (name for position, name in zip(count(), names, strict=False) if position % total == index - 1)


def swept(request: SweepRequest, *, say: Callable[[str], None], echo: Callable[[str], None] | None = None) -> Table:
    """Run a sweep; an interrupt ends it with ``complete=False`` and the rows so far.

    ``say`` gets a line for each row as it comes.

    Raises:
        Lost: the architectures cannot be listed.
        UsageError: an option is wrong, or the implementation cannot be loaded.
    """
    implementation = request.prepare or implementations.default()
    implementations.validate(implementation)
    if requirements.parse(implementation):
        raise UsageError(f"--prepare {implementation}: a sweep is of the transformers that is installed here")
    machine.validate_device(request.device)
    quant = str(Quantization.parse(request.quant))
    common: dict[str, Any] = {"checkpointing": request.checkpointing, "profile": request.profile, "seed": request.seed}
    key = {"task": request.task, "quant": quant, "prepare": implementation, "device": request.device, **common}
    journal = Journal(
        Path(f"{request.output}.jsonl") if request.output else None,
        {**key, "kbitcheck": VERSION, **machine.versions()},
    )
    if journal.stale:
        say("the rows beside the output are of another sweep: starting anew")

    def spec(name: str) -> CaseSpec:
        model = f"arch:{request.task}/{name}"
        return CaseSpec(model=model, quant=quant, implementation=implementation, device=request.device, **common)

    environment: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    complete = True
    try:
        chosen = _chosen(architectures(request.task, echo), request)
        todo = {name: cls for name, cls in chosen.items() if name not in journal.rows}
        if len(todo) < len(chosen):
            say(f"{len(chosen) - len(todo)} of {len(chosen)} rows are there already")
        rows = examine(
            todo, spec, list(rules().values()), jobs=request.jobs, timeout=request.timeout,
            on_environment=environment.update, echo=echo,
        )  # fmt: skip
        with contextlib.closing(rows):
            for number, finished in enumerate(rows, len(chosen) - len(todo) + 1):
                journal.add(finished)
                say(f"{number}/{len(chosen)} {finished.architecture}: {finished.reason or 'audited'}")
    except KeyboardInterrupt:
        complete = False
    return Table(
        task=request.task,
        selected=len(chosen),
        options={"command": request.command, **key},
        environment=environment or {"python": platform.python_version(), **machine.versions()},
        rows=[journal.rows[name] for name in sorted(chosen) if name in journal.rows],
        complete=complete,
    )


def _chosen(classes: Mapping[str, str], request: SweepRequest) -> dict[str, str]:
    """The architectures that ``--select`` and ``--shard`` leave, sorted.

    Raises:
        UsageError: a name or pattern that matches none.
    """
    for pattern in request.select:
        if not fnmatch.filter(classes, pattern):
            hint = did_you_mean(pattern, classes)
            raise UsageError(f"transformers has no {request.task} model of type {pattern!r}{hint}")
    names = [n for n in sorted(classes) if not request.select or any(fnmatch.fnmatch(n, p) for p in request.select)]
    return {name: classes[name] for name in shard(names, request.part, request.parts)}
