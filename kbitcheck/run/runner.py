"""The one runner: cases in, a report out. Built from a generator of events, so that progress is free."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Lost, UsageError, cause
from kbitcheck.core.report import Report
from kbitcheck.core.result import Result
from kbitcheck.core.rule import Rule
from kbitcheck.core.version import TOOL
from kbitcheck.judge.conditions import settle
from kbitcheck.run import virtualenvs as environments
from kbitcheck.run.pool import Bench, broken, spread
from kbitcheck.run.subject import REFERENCE, Implementation
from kbitcheck.run.worker import Event, examine
from kbitcheck.run.worker_process import WorkerProcess

TIMEOUT_SECONDS = 600.0

Blame = Literal["any", "own"]


def run(
    specs: Sequence[CaseSpec],
    rules: Sequence[Rule],
    *,
    timeout: float = TIMEOUT_SECONDS,
    jobs: int = 1,
    in_process: bool = False,
    implementation: Implementation | None = None,
    blame: Blame = "own",
    strict: bool = False,
    subject: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    echo: Callable[[str], None] | None = None,
) -> Report:
    """Judge every case by every rule; the report's results are in the order of the cases, then of the rules.

    ``timeout`` is in seconds a case; ``jobs`` workers run at once, and events come as they are found. All specs name
    the same implementation; ``implementation`` replaces it by a live callable, in process. An interrupt (Ctrl-C) ends
    the run with ``complete=False`` and what was found so far.

    Raises:
        UsageError: a model, implementation or option is wrong.
    """
    start = time.perf_counter()
    live = in_process or implementation is not None
    events = _in_process(specs, rules, implementation) if live else _isolated(specs, rules, timeout, echo, jobs)
    results: list[Result] = []
    facts: dict[str, Any] = {}
    loaded: Event = {"implementation": {}, "environment": {}}
    complete = True
    try:
        with contextlib.closing(events):
            for event in events:
                if event["event"] == "result":
                    result = settle(Result.from_json(event["result"]), specs[0].implementation)
                    results.append(result)
                    event = {**event, "result": result.as_json()}
                elif event["event"] == "facts":
                    facts[event["case"]] = event["facts"]
                elif event["event"] == "loaded":
                    loaded = event
                on_event(event)
    except KeyboardInterrupt:
        complete = False
    order = {spec.id: index for index, spec in enumerate(specs)}
    results.sort(key=lambda result: order[result.case])
    return Report(
        tool=TOOL,
        environment=loaded["environment"],
        subject={
            **(subject or {}),
            "implementation": loaded["implementation"],
            "in_process": live,
            "cases": {spec.id: spec.as_json() for spec in specs},
        },
        results=tuple(results),
        blame="any" if specs and specs[0].implementation == REFERENCE else blame,
        strict=strict,
        complete=complete,
        facts={
            "cases": {case: facts[case] for case in order if case in facts},
            "seconds": round(time.perf_counter() - start, 3),
        },
    )


def _in_process(
    specs: Sequence[CaseSpec], rules: Sequence[Rule], implementation: Implementation | None
) -> Generator[Event, None, None]:
    from kbitcheck.core import machine as environment
    from kbitcheck.observe.case import open_case
    from kbitcheck.run.in_process import as_a_worker
    from kbitcheck.run.subject import load, unused

    device = environment.resolve_device(specs[0].device)
    static = specs[0].static == "always"
    subject = implementation or (unused if static else load)(specs[0].implementation)
    told = environment.describe(device, specs[0].seed)
    yield {"event": "loaded", "implementation": subject.as_json(), "environment": told}
    for spec in specs:
        yield {"event": "case", "case": spec.id}
        events: list[Event] = []
        try:
            placed = spec if spec.static == "always" else dataclasses.replace(spec, device=device)
            with as_a_worker() as fit:
                case = open_case(placed, subject)
                fit(case.base.nbytes)
                events.extend(examine(case, rules))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            seen = {event["result"]["rule"] for event in events if event["event"] == "result"}
            events += broken(spec, rules, seen, cause(error))
        yield from events


def selftest(
    codes: Sequence[str],
    *,
    matrix: bool = False,
    timeout: float = TIMEOUT_SECONDS,
    echo: Callable[[str], None] | None = None,
) -> Generator[Event, None, None]:
    """Run the sabotages of these rules in a worker, with ``matrix`` by all rules; yields a ``sabotage`` event for each.

    Raises:
        Lost: the worker ended, or one answer took longer than ``timeout`` seconds.
        UsageError: a sabotage cannot be run on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="kbitcheck-", ignore_cleanup_errors=True) as scratch:
        worker = WorkerProcess(Path(scratch), echo)
        try:
            for event in worker.ask({"do": "selftest", "codes": list(codes), "matrix": matrix}, timeout):
                if event["event"] == "usage":
                    raise UsageError(event["message"])
                if event["event"] == "broken":
                    raise Lost(event["cause"])
                yield event
        finally:
            worker.close()


def _isolated(
    specs: Sequence[CaseSpec], rules: Sequence[Rule], timeout: float, echo: Callable[[str], None] | None, jobs: int
) -> Generator[Event, None, None]:
    """Cases of one base stay together, as they share what is derived from it alone."""
    groups: dict[tuple[str, str], list[CaseSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.model, spec.quant), []).append(spec)

    def serve(bench: Bench, group: Sequence[CaseSpec]) -> Iterator[Event]:
        for spec in group:
            yield {"event": "case", "case": spec.id}
            yield from bench.examine(spec)

    with tempfile.TemporaryDirectory(prefix="kbitcheck-", ignore_cleanup_errors=True) as scratch:
        called = bool(specs) and specs[0].static != "always"
        python = environments.interpreter(specs[0].implementation) if called else sys.executable
        benches = [Bench(Path(scratch), rules, timeout, echo, python=python) for _ in range(min(jobs, len(groups)))]
        yield from spread(list(groups.values()), serve, benches)
