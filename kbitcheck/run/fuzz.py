"""Drawn cases, judged one by one in a warm worker; of those that fail, the smallest. Needs hypothesis, and no torch."""

import contextlib
import dataclasses
import hashlib
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, reject, seed, settings
from hypothesis.database import ExampleDatabase, InMemoryExampleDatabase

from kbitcheck.core.cases import REFERENCE, CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.events import Collector, Event, Loaded, Started
from kbitcheck.core.report import EXIT_CONFORMS, EXIT_NOTHING, Report, assemble
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import Rule
from kbitcheck.report.parts.repro import command
from kbitcheck.run import virtualenvs
from kbitcheck.run.findings import settler
from kbitcheck.run.pool import Worker
from kbitcheck.run.worker_process import scratch_directory
from kbitcheck.strategies import Drawn, cases

REPORTED = 500  # cases whose results a report has where none fails


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is drawn, and by what it is judged: ``number`` cases, or as many as ``seconds`` allow.

    ``options`` are those of ``CaseSpec`` that all cases share.
    """

    implementation: str
    rules: Sequence[Rule]
    number: int
    seconds: float
    seed: int
    strict: bool
    models: Sequence[str]
    quants: Sequence[str]
    checkpointing: Sequence[Any]
    options: Mapping[str, Any]


class Broken(AssertionError):
    """A drawn case does not conform."""


class _Over(BaseException):
    """The time is over. Hypothesis takes any other exception for a failure of the case."""


def fuzz(
    plan: Plan, *, timeout: float, on_event: Callable[[Event], None], echo: Callable[[str], None] | None
) -> Report:
    """Draw and judge cases until one fails, ``plan.number`` have passed or the time is over; then shrink the one that failed.

    The report is that of all cases where they pass, else of the smallest failing one alone; ``subject["fuzz"]`` tells
    how many were drawn, and of a failing one the recipe as TOML and the command that runs it again. The same seed draws
    the same cases; hypothesis first tries what it has in its database (``.hypothesis``) from earlier failures.
    """
    with scratch_directory() as scratch:
        python, beside = virtualenvs.interpreter(plan.implementation), plan.implementation != REFERENCE
        with contextlib.closing(Worker(scratch, timeout, echo, python=python, beside_reference=beside)) as worker:
            return _Run(plan=plan, scratch=scratch, on_event=on_event, worker=worker).report()


class _Own(ExampleDatabase):
    """One implementation's part of a database: what broke another is not tried first on it."""

    def __init__(self, whole: ExampleDatabase | None, implementation: str) -> None:
        super().__init__()
        self._whole, self._prefix = whole or InMemoryExampleDatabase(), implementation.encode() + b":"

    def save(self, key: bytes, value: bytes) -> None:
        self._whole.save(self._prefix + key, value)

    def fetch(self, key: bytes) -> Iterable[bytes]:
        return self._whole.fetch(self._prefix + key)

    def delete(self, key: bytes, value: bytes) -> None:
        self._whole.delete(self._prefix + key, value)


@dataclasses.dataclass(slots=True, kw_only=True)
class _Run:
    """One run of the fuzzer: what it drew, what came of it, and the worker it asks."""

    plan: Plan
    scratch: Path
    on_event: Callable[[Event], None]
    worker: Worker
    specs: dict[str, CaseSpec] = dataclasses.field(default_factory=dict)
    results: dict[str, tuple[Result, ...]] = dataclasses.field(default_factory=dict)
    unloadable: dict[str, str] = dataclasses.field(default_factory=dict)
    loaded: Loaded = dataclasses.field(default_factory=Loaded)
    suspects: Sequence[Rule] = ()
    smallest: tuple[Drawn, CaseSpec, tuple[Result, ...]] | None = None
    drawn: int = 0

    def report(self) -> Report:
        complete = True
        try:
            self._search()
        except (Broken, _Over):
            pass
        except KeyboardInterrupt:
            complete = False
        drawn: dict[str, Any] = {"cases": self.drawn, "seed": self.plan.seed, "unloadable": self.unloadable}
        if self.smallest is None:
            results = tuple(result for case in self.results.values() for result in case)
            return self._report(results, self.specs, complete=complete, fuzz=drawn)
        smallest, spec, results = self.smallest
        if complete:
            _, results = self._judge(smallest, self.plan.rules)
        report = self._report(results, {spec.id: spec})
        again = command(report, spec.id, ",".join(_broken(report))) + (" --strict" if self.plan.strict else "")
        drawn |= {"recipe": smallest.toml, "file": spec.model, "command": again}
        return self._report(results, {spec.id: spec}, complete=complete, fuzz=drawn)

    def _search(self) -> None:
        plan, end = self.plan, time.monotonic() + self.plan.seconds

        @settings(  # outside of the seed, which takes the database away
            max_examples=plan.number,
            database=_Own(settings().database, plan.implementation),
            deadline=None,
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
        )
        @seed(plan.seed)
        @given(cases(models=plan.models, quants=plan.quants, checkpointing=plan.checkpointing))
        def conforms(drawn: Drawn) -> None:
            if time.monotonic() > end:
                raise _Over
            self.drawn += 1
            spec, results = self._judge(drawn, self.suspects or plan.rules)
            report = self._report(results, {spec.id: spec})
            if report.exit_code not in (EXIT_CONFORMS, EXIT_NOTHING):
                self.smallest = drawn, spec, results
                # What shrinks is this failure, and not another one that a smaller case happens to have.
                self.suspects = [rule for rule in plan.rules if rule.code in _broken(report)][:1]
                raise Broken

        conforms()

    def _judge(self, drawn: Drawn, rules: Sequence[Rule]) -> tuple[CaseSpec, tuple[Result, ...]]:
        spec = drawn.spec(self._model(drawn), self.plan.implementation, **self.plan.options)
        self.on_event(Started(case=spec.id))
        # Nobody reads the files but this run's worker.
        outside = dataclasses.replace(spec, model=str(self.scratch / spec.model)) if drawn.toml else spec
        collector = Collector(settler([outside]), loaded=self.loaded)
        try:
            for event in self.worker.examine(outside, rules):
                collector.add(event)
        except UsageError as error:
            if not drawn.toml or not self.worker.loaded:
                raise
            self.unloadable[spec.id] = str(error).replace(f"{self.scratch}/", "")
            reject()
        finally:
            self.loaded = collector.loaded if collector.loaded.environment else self.loaded
        results = tuple(dataclasses.replace(result, case=spec.id) for result in collector.results)
        if len(self.specs) < REPORTED:
            self.specs[spec.id] = spec
            self.results[spec.id] = results
        return spec, results

    def _model(self, drawn: Drawn) -> str:
        """The name that a drawn model goes by: that of its recipe's file, which is written."""
        if isinstance(drawn.model, str):
            return drawn.model
        name = f"drawn-{_digest(drawn.toml)}.toml"
        (self.scratch / name).write_text(drawn.toml, encoding="utf-8")
        return name

    def _report(
        self, results: Sequence[Result], specs: Mapping[str, CaseSpec], *, complete: bool = True, **subject: Any
    ) -> Report:
        collector = Collector(loaded=self.loaded)
        collector.results.extend(results)
        return assemble(
            collector,
            {name: spec.as_json() for name, spec in specs.items()},
            subject={"command": "impl", "ignored": {}, **subject},
            strict=self.plan.strict,
            complete=complete,
        )


def _broken(report: Report) -> list[str]:
    return [result.rule for result in report if result.status is Status.ERROR or report.counts(result)]


def epilogue(report: Report) -> str:
    """The text under a report: how to draw the cases again, or the smallest failing case as a recipe and a command."""
    drawn: Mapping[str, Any] = report.subject["fuzz"]
    lines = [f"{drawn['cases']} cases drawn, seed {drawn['seed']}"]
    lines += [f"not loadable: {case}: {why}" for case, why in drawn["unloadable"].items()]
    if "command" in drawn:
        if drawn["recipe"]:
            file = shlex.quote(drawn["file"])
            lines.append(f"the smallest that fails is this recipe, {file} (it fits into fixtures/ too):\n")
            lines.append(drawn["recipe"])
        lines += [f"again   {drawn['command']}"]
    return "\n".join(lines) + "\n"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
