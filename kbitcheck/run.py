"""The one runner: cases in, a report out. Built from a generator of events, so that progress is free."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import kbitcheck
from kbitcheck.core import Party, Report, Result, Rule, Status, UsageError
from kbitcheck.implementations import REFERENCE, Implementation
from kbitcheck.process import Lost, WorkerProcess
from kbitcheck.suite import CaseSpec
from kbitcheck.worker import Event, cause, examine

TIMEOUT_SECONDS = 600.0
POISON = ("MemoryError", "CUDA")  # what leaves a process that the next case cannot trust

Blame = Literal["any", "own"]


def run(
    specs: Sequence[CaseSpec],
    rules: Sequence[Rule],
    *,
    timeout: float = TIMEOUT_SECONDS,
    in_process: bool = False,
    implementation: Implementation | None = None,
    blame: Blame = "own",
    strict: bool = False,
    subject: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    echo: Callable[[str], None] | None = None,
) -> Report:
    """Judge every case by every rule; results come in the order of the cases, then of the rules.

    ``timeout`` is in seconds a case. All specs name the same implementation; ``implementation`` replaces it by a live
    callable, in process. An interrupt (Ctrl-C) ends the run with ``complete=False`` and what was found so far.

    Raises:
        UsageError: a model, implementation or option is wrong.
    """
    start = time.perf_counter()
    live = in_process or implementation is not None
    events = _in_process(specs, rules, implementation) if live else _isolated(specs, rules, timeout, echo)
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
    return Report(
        tool=f"kbitcheck {kbitcheck.__version__}",
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
        facts={"cases": facts, "seconds": round(time.perf_counter() - start, 3)},
    )


@cache
def findings() -> Mapping[tuple[str, Party], str]:
    """The committed list: why each (rule, party) may fail for the reference, and the script that shows it."""
    listed = tomllib.loads((files("kbitcheck") / "findings.toml").read_text(encoding="utf-8"))["finding"]
    return {(f["rule"], Party(f["party"])): f"{f['why']} ({f['script']})" for f in listed}


def settle(result: Result, implementation: str) -> Result:
    """Of the reference nothing is excused by party: only committed findings, which are then told and not counted."""
    if result.status is not Status.FAIL or implementation != REFERENCE:
        return result
    excuses = [findings().get((result.rule, f.party)) for f in result.failures]
    if None in excuses:
        return result
    return dataclasses.replace(result, finding=excuses[0] or "")


def _in_process(
    specs: Sequence[CaseSpec], rules: Sequence[Rule], implementation: Implementation | None
) -> Generator[Event, None, None]:
    from kbitcheck import environment
    from kbitcheck.case import open_case
    from kbitcheck.implementations import load, unused

    device = environment.resolve_device(specs[0].device)
    static = specs[0].static == "always"
    subject = implementation or (unused if static else load)(specs[0].implementation)
    told = environment.describe(device, specs[0].seed)
    yield {"event": "loaded", "implementation": subject.as_json(), "environment": told}
    for spec in specs:
        seen: set[str] = set()
        yield {"event": "case", "case": spec.id}
        try:
            placed = spec if spec.static == "always" else dataclasses.replace(spec, device=device)
            for event in examine(open_case(placed, subject), rules):
                if event["event"] == "result":
                    seen.add(event["result"]["rule"])
                yield event
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            yield from _broken(spec, rules, seen, cause(error))


def selftest(
    codes: Sequence[str], *, timeout: float = TIMEOUT_SECONDS, echo: Callable[[str], None] | None = None
) -> Generator[Event, None, None]:
    """Run the sabotages of these rules in a worker; yields a ``sabotage`` event for each.

    Raises:
        Lost: the worker ended, or one answer took longer than ``timeout`` seconds.
        UsageError: a sabotage cannot be run on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="kbitcheck-", ignore_cleanup_errors=True) as scratch:
        worker = WorkerProcess(Path(scratch), echo)
        try:
            for event in worker.ask({"do": "selftest", "codes": list(codes)}, timeout):
                if event["event"] == "usage":
                    raise UsageError(event["message"])
                if event["event"] == "broken":
                    raise Lost(event["cause"])
                yield event
        finally:
            worker.close()


def _isolated(
    specs: Sequence[CaseSpec], rules: Sequence[Rule], timeout: float, echo: Callable[[str], None] | None
) -> Generator[Event, None, None]:
    with tempfile.TemporaryDirectory(prefix="kbitcheck-", ignore_cleanup_errors=True) as scratch:
        bench = Bench(Path(scratch), rules, timeout, echo)
        try:
            bench.start()  # before anything else: it takes seconds to get warm
            for spec in specs:
                yield {"event": "case", "case": spec.id}
                yield from bench.examine(spec)
        finally:
            bench.close()


class Bench:
    """Examines cases of one implementation in a worker, and replaces a worker that a case has ruined.

    ``path`` are directories from which the worker imports the implementation, ``environment`` variables it gets.
    """

    def __init__(
        self,
        scratch: Path,
        rules: Sequence[Rule],
        timeout: float,
        echo: Callable[[str], None] | None = None,
        *,
        path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._scratch, self._rules, self._timeout, self._echo = scratch, rules, timeout, echo
        self._path, self._environment = path, environment
        self._worker: WorkerProcess | None = None
        self.loaded = False
        self._hopeless = ""

    def start(self) -> None:
        self._worker = WorkerProcess(self._scratch, self._echo, self._environment)
        self.loaded = False

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self.loaded = False

    def examine(self, spec: CaseSpec, rules: Sequence[Rule] | None = None) -> Iterator[Event]:
        """The events of one case, by other rules if given; ERROR results fill in for what a lost worker did not report."""
        rules = self._rules if rules is None else rules
        if not self.loaded and not self._hopeless:
            yield from self._load(spec)
        if self._hopeless:
            yield from _broken(spec, rules, set(), self._hopeless)
            return
        seen: set[str] = set()
        try:
            yield from self._case(spec, rules, seen)
        except Lost as lost:
            self.close()
            yield from _broken(spec, rules, seen, str(lost))

    def _load(self, spec: CaseSpec) -> Iterator[Event]:
        """Load the implementation. Where even that ends the worker, no case can be run."""
        if self._worker is None:
            self.start()
        request = {
            "do": "load",
            "implementation": spec.implementation,
            "path": list(self._path),
            "device": spec.device,
            "seed": spec.seed,
            "static": spec.static == "always",
        }
        try:
            yield from self._ask(request)
            self.loaded = True
        except Lost as lost:
            self._hopeless = f"{spec.implementation} could not be loaded: {lost}"

    def _case(self, spec: CaseSpec, rules: Sequence[Rule], seen: set[str]) -> Iterator[Event]:
        request = {"do": "case", "spec": spec.as_json(), "rules": [rule.code for rule in rules]}
        poisoned = False
        for event in self._ask(request):
            if event["event"] == "result":
                seen.add(event["result"]["rule"])
                reason = event["result"]["reason"]
                poisoned |= event["result"]["status"] == Status.ERROR and any(word in reason for word in POISON)
            elif event["event"] == "broken":
                poisoned |= event["fatal"]
                yield from _broken(spec, rules, seen, event["cause"])
            yield event
        if poisoned:
            self.close()

    def _ask(self, request: Event) -> Iterator[Event]:
        assert self._worker is not None
        for event in self._worker.ask(request, self._timeout):
            if self._echo is not None and "traceback" in event:
                self._echo(event["traceback"])
            if event["event"] == "usage":
                raise UsageError(event["message"])
            if event["event"] == "broken" and request["do"] == "load":
                raise Lost(event["cause"])
            yield event


def _broken(spec: CaseSpec, rules: Sequence[Rule], seen: set[str], why: str) -> Iterator[Event]:
    """An ERROR result for every rule that a case did not come to."""
    for rule in rules:
        if rule.code not in seen:
            result = Result(rule=rule.code, case=spec.id, level=rule.level, status=Status.ERROR, reason=why)
            yield {"event": "result", "result": result.as_json()}
