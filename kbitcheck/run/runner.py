"""The one runner: cases in, a report out, by way of a stream of events."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from kbitcheck.core.cases import REFERENCE, CaseSpec, Implementation
from kbitcheck.core.events import Collector, Event, Planned, Started
from kbitcheck.core.plan import Plan
from kbitcheck.core.report import Blame, Report, assemble
from kbitcheck.core.rule import Rule
from kbitcheck.run import virtualenvs
from kbitcheck.run.examine import judging
from kbitcheck.run.findings import settler
from kbitcheck.run.in_process import examine_all
from kbitcheck.run.pool import Worker, spread
from kbitcheck.run.requests import MakePlan
from kbitcheck.run.worker_process import answers, scratch_directory

PLANNING_SECONDS = 300.0


def run(
    specs: Sequence[CaseSpec],
    rules: Sequence[Rule],
    *,
    timeout: float = 600.0,
    jobs: int = 1,
    in_process: bool = False,
    implementation: Implementation | None = None,
    blame: Blame = "own",
    strict: bool = False,
    subject: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], object] = lambda event: None,
    echo: Callable[[str], None] | None = None,
) -> Report:
    """Judge every case by every rule; the report's results are in the order of the cases, then of the rules.

    ``timeout`` is in seconds a case; ``jobs`` workers run at once, and ``on_event`` gets events as they come. All specs
    name the same implementation; ``implementation`` replaces it by a live callable, in this process. An interrupt
    (Ctrl-C) ends the run with ``complete=False`` and the results so far.
    """
    start = time.perf_counter()
    live = in_process or implementation is not None
    beside = blame == "own" and all(spec.implementation != REFERENCE for spec in specs)
    collector = Collector(settler(specs))
    complete = True
    events = (
        examine_all(specs, rules, implementation, on_event, beside_reference=beside)
        if live
        else _isolated(specs, rules, timeout, echo, jobs, beside_reference=beside)
    )
    try:
        with contextlib.closing(events):
            for event in events:
                on_event(collector.add(event))
    except KeyboardInterrupt:
        complete = False
    return assemble(
        collector,
        {spec.id: spec.as_json() for spec in specs},
        subject=subject or {},
        blame=blame,
        in_process=live,
        strict=strict,
        complete=complete,
        seconds=time.perf_counter() - start,
    )


def plans(
    specs: Sequence[CaseSpec],
    rules: Sequence[Rule],
    *,
    timeout: float = 600.0,
    echo: Callable[[str], None] | None = None,
) -> list[Plan]:
    """What each case will compute, which of it is left out for ``timeout`` or memory, and the predicted price.

    Raises:
        Lost: the process that plans ended or hung.
    """
    request = MakePlan(specs=tuple(specs), rules=tuple(rule.code for rule in rules), seconds=timeout)
    with contextlib.closing(answers(request, PLANNING_SECONDS, echo)) as events:
        return [event.plan for event in events if isinstance(event, Planned)]


def _isolated(
    specs: Sequence[CaseSpec],
    rules: Sequence[Rule],
    timeout: float,
    echo: Callable[[str], None] | None,
    jobs: int,
    *,
    beside_reference: bool,
) -> Generator[Event, None, None]:
    """The events of the cases, from worker processes. Cases of one base stay together: they share facts of the base."""
    groups: dict[tuple[str, str], list[CaseSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.model, spec.quant), []).append(spec)

    def serve(worker: Worker, group: Sequence[CaseSpec]) -> Iterator[Event]:
        for spec in group:
            if judged := judging(spec, rules):
                yield Started(case=spec.id)
                yield from worker.examine(spec, judged)

    with scratch_directory() as scratch:
        called = bool(specs) and specs[0].static != "always"
        python = virtualenvs.interpreter(specs[0].implementation) if called else sys.executable
        workers = [
            Worker(scratch, timeout, echo, python=python, beside_reference=beside_reference)
            for _ in range(min(jobs, len(groups)))
        ]
        yield from spread(list(groups.values()), serve, workers)
