"""A report: the results of one run, its verdict and its exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from kbitcheck.core.cases import REFERENCE
from kbitcheck.core.errors import UsageError
from kbitcheck.core.result import Level, Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.core.version import TOOL

if TYPE_CHECKING:
    from kbitcheck.core.events import Collector  # slow to import, and the plugin's start has no use for it

SCHEMA = 1
ORACLE = "KB304"
GRADIENT_VALUES = frozenset({"KB302", "KB303", ORACLE})

Blame = Literal["any", "own"]
EXIT_CONFORMS, EXIT_BROKEN_RULE, EXIT_INTERRUPTED, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING = range(6)


def exit_code(
    *,
    usage: bool = False,
    interrupted: bool = False,
    broken: bool = False,
    not_judged: bool = False,
    nothing: bool = False,
) -> int:
    """The exit code of whatever was run: of several conditions that hold, the first argument's decides.

    ``broken``: a requirement that counts is broken. ``not_judged``: something could not be judged. ``nothing``: nothing
    was checked. This is the one place that knows the precedence.
    """
    conditions = (
        (usage, EXIT_USAGE),
        (interrupted, EXIT_INTERRUPTED),
        (broken, EXIT_BROKEN_RULE),
        (not_judged, EXIT_ERROR),
        (nothing, EXIT_NOTHING),
    )
    return next((code for holds, code in conditions if holds), EXIT_CONFORMS)


def worst(codes: Iterable[int]) -> int:
    """Of the exit codes of several runs the one that says most, in the order of ``exit_code``."""
    codes = {*codes}
    return exit_code(
        usage=EXIT_USAGE in codes,
        interrupted=EXIT_INTERRUPTED in codes,
        broken=EXIT_BROKEN_RULE in codes,
        not_judged=EXIT_ERROR in codes,
        nothing=EXIT_NOTHING in codes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The results of one run, as plain data; its JSON form is what ``--format json`` prints and ``show`` reads.

    ``subject`` says what was run (command, model or implementation, options); ``environment`` holds versions, device and
    seed; ``blame`` is ``"any"`` where a failure counts whoever is at fault and ``"own"`` where only the
    implementation's do. ``complete`` is False when the run was cut short. ``gate`` is what a comparison with a ledger or
    another report yields (``kbitcheck.compare.gate.judge``); then it decides, and no longer the rules alone.
    """

    tool: str
    environment: Mapping[str, Any]
    subject: Mapping[str, Any]
    results: Sequence[Result]
    blame: str
    strict: bool = False
    complete: bool = True
    schema: int = SCHEMA
    facts: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        """One line, as a prompt shows it: all fields of a report are a screen of text."""
        return f"<Report: exit code {self.exit_code}, {len(self.results)} results, {len(self.findings)} findings>"

    def __str__(self) -> str:
        """The report as the command line prints it."""
        return _renderer(self, "text")

    def _repr_html_(self) -> str:
        """The HTML report in a frame of its own, as a notebook shows it."""
        return _renderer(self, "notebook")

    def counts(self, result: Result) -> bool:
        """Whether a result makes the run non-conforming; in a gate, whether it is a breach."""
        if self.gate is not None:
            return any(
                b["counted"] and result.rule in b["rules"] and result.case in b["cases"] for b in self.gate["breaches"]
            )
        if result.status is not Status.FAIL or result.level is Level.INFO or result.finding:
            return False
        if result.level is Level.SHOULD and not self.strict:
            return False
        return self.blame == "any" or result.own

    @property
    def summary(self) -> dict[str, int]:
        """Number of results by what came of them; ``counted`` are the failures that decide the verdict."""
        of = {status.value.lower(): 0 for status in Status}
        for result in self.results:
            of[result.status.value.lower()] += 1
        return {**of, "counted": sum(map(self.counts, self.results))}

    @property
    def broken(self) -> bool:
        """Whether a requirement that counts is broken; in a gate, whether a breach is more than what could not be judged."""
        if self.gate is None:
            return any(map(self.counts, self.results))
        errors = {(r.rule, r.case) for r in self.results if r.status is Status.ERROR}
        return any(
            (rule, case) not in errors
            for breach in self.gate["breaches"]
            if breach["counted"]
            for rule in breach["rules"]
            for case in breach["cases"]
        )

    @property
    def not_judged(self) -> bool:
        """Whether a rule could not be judged; in a gate, one whose ERROR is not accepted."""
        return any(r.status is Status.ERROR and (self.gate is None or self.counts(r)) for r in self.results)

    @property
    def findings(self) -> tuple[Result, ...]:
        """What is worth reading: failures and what could not be judged, those that count first."""
        worth = [r for r in self.results if r.status in (Status.FAIL, Status.ERROR)]
        return tuple(sorted(worth, key=lambda r: (not self.counts(r), r.status is Status.FAIL, r.rule, r.case)))

    @property
    def no_gradients(self) -> str:
        """Why no gradient was judged, where rules on gradients ran and every one was skipped; else empty.

        Of these rules, those that need a gradient's right value decide, if any of them ran.
        """
        family = [r for r in self.results if r.rule in rules() and rules()[r.rule].family == "gradients"]
        decisive = [r for r in family if r.rule in GRADIENT_VALUES] or family
        if not decisive or any(r.status is not Status.SKIP for r in decisive):
            return ""
        # Rules on checkpointing are skipped without it, whatever else there is; the oracle's reason holds for all.
        oracle = [r for r in decisive if r.rule == ORACLE] or decisive
        ((reason, _),) = Counter(r.reason for r in oracle).most_common(1)
        return reason

    @property
    def exit_code(self) -> int:
        """0 conforms, 1 does not, 2 interrupted, 3 something could not be judged, 5 nothing was checked.

        Under ``strict`` it is 5 also if no gradient was judged.
        """
        return exit_code(
            interrupted=not self.complete,
            broken=self.broken,
            not_judged=self.not_judged,
            nothing=not any(r.status in (Status.PASS, Status.FAIL) for r in self.results)
            or (self.strict and self.gate is None and bool(self.no_gradients)),
        )

    def raise_for_failures(self) -> None:
        """Raise ``NonConformance`` unless the run conforms."""
        if self.exit_code != EXIT_CONFORMS:
            raise NonConformance(self)

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        return {
            "schema": self.schema,
            "tool": self.tool,
            "environment": dict(self.environment),
            "subject": dict(self.subject),
            "blame": self.blame,
            "strict": self.strict,
            "complete": self.complete,
            "summary": self.summary,
            "exit_code": self.exit_code,
            "gate": self.gate,
            "facts": dict(self.facts),
            "results": [r.as_json() for r in self.results],
        }

    def to_dict(self) -> dict[str, Any]:
        """What ``--format json`` writes, as a dictionary."""
        return self.as_json()

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Inverse of ``as_json``; a ``UsageError`` where the data is no report of this schema."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise UsageError(f"not a kbitcheck report of schema {SCHEMA}")
        try:
            kept = {k: data[k] for k in ("tool", "environment", "subject", "blame", "strict", "complete", "facts")}
            return cls(**kept, gate=data.get("gate"), results=tuple(map(Result.from_json, data["results"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"a damaged kbitcheck report ({type(error).__name__}: {error})") from None

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)


def _undressed(report: Report, form: str) -> str:
    return repr(report)


_renderer: Callable[[Report, str], str] = _undressed


def register_renderer(function: Callable[[Report, str], str]) -> None:
    """Name the function behind ``str(report)`` and what a notebook shows: of a report and a format, its text."""
    global _renderer
    _renderer = function


def assemble(
    collected: Collector,
    cases: Mapping[str, Mapping[str, Any]],
    *,
    subject: Mapping[str, Any],
    blame: Blame = "own",
    in_process: bool = False,
    strict: bool = False,
    complete: bool = True,
    seconds: float | None = None,
) -> Report:
    """The report of a run: its results in the order of the cases, those of one case in the order of their rules.

    ``cases`` are the specs (``CaseSpec.as_json``) by id; ``subject`` says which command ran and which rules it ignored;
    ``seconds`` is the duration of the run. Of the reference every failure counts, whoever it is attributed to.
    """
    implementations = {spec["implementation"] for spec in cases.values()}
    order = {case: index for index, case in enumerate(cases)}
    duration = {} if seconds is None else {"seconds": round(seconds, 3)}
    return Report(
        tool=TOOL,
        environment=collected.loaded.environment,
        subject={
            **subject,
            "implementation": collected.loaded.implementation,
            "in_process": in_process,
            **({"cases": dict(cases)} if cases else {}),
        },
        results=tuple(sorted(collected.results, key=lambda result: (order.get(result.case, len(order)), result.rule))),
        blame="any" if implementations == {REFERENCE} else blame,
        strict=strict,
        complete=complete,
        facts={"cases": {case: collected.facts[case] for case in cases if case in collected.facts}, **duration},
    )


class NonConformance(AssertionError):
    """A report that does not conform; the message lists the rules that were broken, where none is given."""

    def __init__(self, report: Report, message: str = "") -> None:
        self.report = report
        lines = [
            f"{rules().title(r.rule)} [{r.case}]: {r.reason or r.failures[0].where + ': ' + r.failures[0].actual}"
            for r in report.results
            if r.status is Status.ERROR or report.counts(r)
        ]
        super().__init__(message or "\n".join(lines) or "nothing was checked")
