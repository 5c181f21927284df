"""The check model: what a rule is, what it observes, and what comes of it. Standard library only."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from inspect import getdoc
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from kbitcheck.facts import Facts

SCHEMA = 1

log = logging.getLogger("kbitcheck")

CODE = re.compile(r"KB\d{3}")


def cause(error: BaseException) -> str:
    """An exception on one line."""
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}".removesuffix(": ")


class Level(StrEnum):
    """How binding a requirement is: breaking a MUST is non-conformance, a SHOULD counts under ``--strict``, INFO is told."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    INFO = "INFO"


class Status(StrEnum):
    """What came of one rule on one case."""

    PASS = "PASS"  # noqa: S105  (no password)
    FAIL = "FAIL"
    SKIP = "SKIP"
    ERROR = "ERROR"


class Party(StrEnum):
    """Who a deviation belongs to."""

    IMPLEMENTATION = "implementation"
    MODEL = "model"
    STACK = "stack"


class NotApplicable(Exception):
    """Raised by a rule that has, for a stated reason, nothing to examine on this case."""


class UsageError(Exception):
    """Wrong input: the message is one line that says what is wrong and what to do (exit code 4)."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One thing a rule examined.

    ``where`` names a parameter, layer or fact; ``party`` says whose a deviation is, and ``witness`` what shows that it
    is not the implementation's (required for any other party). ``note`` is a fact worth telling once, whatever ``ok`` is.
    """

    where: str
    ok: bool
    expected: str
    actual: str
    party: Party = Party.IMPLEMENTATION
    witness: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not self.ok and self.party is not Party.IMPLEMENTATION and not self.witness:
            raise ValueError(f"{self.where}: a deviation of the {self.party.value} needs a witness")


Check = Callable[["Facts"], Iterable[Observation]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A requirement of the specification and the pure function that judges facts by it.

    The first paragraph of the function's docstring is the requirement; the sections headed ``Why``, ``Symptom``, ``Fix``
    and ``Sources`` are the rest of its page.
    """

    code: str
    name: str
    level: Level
    check: Check
    level_of: Callable[[Facts], Level] | None = None

    @property
    def requirement(self) -> str:
        """The first paragraph of the page, on one line."""
        return " ".join(self._page[""].split())

    def section(self, heading: str) -> str:
        """The text under ``heading`` on one line, or an empty string."""
        return " ".join(self._page.get(heading, "").split())

    @property
    def _page(self) -> dict[str, str]:
        page: dict[str, str] = {"": ""}
        heading = ""
        for line in (getdoc(self.check) or "").splitlines():
            found = re.fullmatch(r"(Why|Symptom|Fix|Sources): *(.*)", line)
            if found:
                heading, line = found[1], found[2]
                page[heading] = ""
            page[heading] += line.replace("``", "`") + "\n"
        return page

    @property
    def family(self) -> str:
        """The module the rule lives in: freezing, precision, gradients, checkpointing, contract, cost or audit."""
        return self.check.__module__.rpartition(".")[2]


_registry: dict[str, Rule] = {}


def rule(
    code: str, name: str, level: Level, *, level_of: Callable[[Facts], Level] | None = None
) -> Callable[[Check], Check]:
    """Register a check under its code. ``level_of`` overrides the level by facts (a MUST only when reentrant, say)."""

    def register(check: Check) -> Check:
        if not CODE.fullmatch(code) or code in _registry:
            raise ValueError(f"{code!r} is not a fresh rule code")
        _registry[code] = Rule(code=code, name=name, level=level, check=check, level_of=level_of)
        return check

    return register


def rules() -> dict[str, Rule]:
    """Every registered rule by code, sorted."""
    import kbitcheck.rules  # noqa: F401  (registers them)

    return dict(sorted(_registry.items()))


def select(codes: Sequence[str] = (), ignore: Mapping[str, str] | None = None) -> list[Rule]:
    """The rules whose codes start with any of ``codes`` (all by default), less the ignored prefixes.

    Raises:
        UsageError: a code or prefix that matches no rule.
    """
    known = rules()
    ignored = ignore or {}
    for prefix in (*codes, *ignored):
        if not any(code.startswith(prefix.upper()) for code in known):
            raise UsageError(f"no rule matches {prefix!r}; see `kbitcheck rules`")
    return [
        found
        for code, found in known.items()
        if (not codes or code.startswith(tuple(c.upper() for c in codes)))
        and not (ignored and code.startswith(tuple(c.upper() for c in ignored)))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One rule on one case. ``examined`` counts observations; ``failures`` holds those that are not ok.

    ``finding`` says which committed finding excuses the failure: it is told and not counted.
    """

    rule: str
    case: str
    level: Level
    status: Status
    attributed_to: Party | None = None
    examined: int = 0
    reason: str = ""
    failures: tuple[Observation, ...] = ()
    notes: tuple[str, ...] = ()
    finding: str = ""
    seconds: float = 0.0

    @property
    def own(self) -> bool:
        """Whether any failure is the implementation's own."""
        return any(f.party is Party.IMPLEMENTATION for f in self.failures)

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back.

        What is at its default is left out, and neighbouring failures that differ in their places alone share an entry:
        of hundreds of rules most passed, and a failure tends to be one of many.
        """
        return {**_told(self, "failures"), **({"failures": _shared(self.failures)} if self.failures else {})}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        party = data.get("attributed_to")
        return cls(
            **{
                **data,
                "level": Level(data["level"]),
                "status": Status(data["status"]),
                "attributed_to": None if party is None else Party(party),
                "notes": tuple(data.get("notes", ())),
                "failures": tuple(seen for entry in data.get("failures", ()) for seen in _spread(entry)),
            }
        )


def _told(thing: Result | Observation, *without: str) -> dict[str, Any]:
    """The fields that are not at their default."""
    found = ((f.name, getattr(thing, f.name), f.default) for f in fields(thing) if f.name not in without)
    return {name: list(value) if isinstance(value, tuple) else value for name, value, usual in found if value != usual}


def _shared(failures: Iterable[Observation]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for seen in failures:
        told = _told(seen, "where", *(() if seen.ok else ("ok",)))
        if entries and {k: v for k, v in entries[-1].items() if k != "where"} == told:
            entries[-1]["where"].append(seen.where)
        else:
            entries.append({"where": [seen.where], **told})
    return entries


def _spread(entry: Mapping[str, Any]) -> Iterator[Observation]:
    places = [entry["where"]] if isinstance(entry["where"], str) else entry["where"]
    party = Party(entry.get("party", Party.IMPLEMENTATION))
    for where in places:
        yield Observation(**{"ok": False, **entry, "where": where, "party": party})


def judge(subject: Rule, facts: Facts) -> Result:
    """Run one rule on one case. What a rule raises becomes a SKIP or an ERROR result, wrong usage alone passes through.

    No observation at all is an ERROR: there is no way to pass by accident.
    """
    start = time.perf_counter()
    level, reason, examined = subject.level, "", 0
    failures: list[Observation] = []
    notes: dict[str, None] = {}
    try:
        if subject.level_of is not None:
            level = subject.level_of(facts)
        for seen in subject.check(facts):
            examined += 1
            if seen.note:
                notes[seen.note] = None
            if not seen.ok:
                failures.append(seen)
        status = Status.FAIL if failures else Status.PASS
        if not examined:
            status, reason = Status.ERROR, "vacuous: the rule examined nothing"
    except NotApplicable as skip:
        # What was seen broken before stays broken.
        status, reason = (Status.FAIL, "") if failures else (Status.SKIP, str(skip))
    except UsageError:
        raise
    except Exception as error:
        log.debug("%s on %s", subject.code, facts.case, exc_info=True)
        status, reason = Status.ERROR, cause(error)
    parties = {f.party for f in failures}
    blamed = next((p for p in Party if p in parties), None)
    return Result(
        rule=subject.code,
        case=facts.case,
        level=level,
        status=status,
        attributed_to=blamed,
        examined=examined,
        reason=reason,
        failures=tuple(failures),
        notes=tuple(notes),
        seconds=round(time.perf_counter() - start, 6),
    )


EXIT_CONFORMS, EXIT_BROKEN_RULE, EXIT_INTERRUPTED, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything one run found, as plain data; its JSON form is what ``--format json`` prints and ``show`` reads.

    ``subject`` says what was run (command, model or implementation, options); ``environment`` holds versions, device and
    seed; ``blame`` is ``"any"`` where a failure counts whoever is at fault and ``"own"`` where only the
    implementation's do. ``complete`` is False when the run was cut short. ``gate`` is what a comparison with a ledger or
    another report found (``kbitcheck.gate.judge``); then it decides, and no longer the rules alone.
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

    def __str__(self) -> str:
        """The report as the command line prints it."""
        from kbitcheck.reporters import render

        return render(self, "text")

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
    def exit_code(self) -> int:
        """0 conforms, 1 does not, 2 interrupted, 3 something broke, 5 nothing was checked."""
        summary = self.summary
        if not self.complete:
            return EXIT_INTERRUPTED
        if any(r.status is Status.ERROR and (self.gate is None or self.counts(r)) for r in self.results):
            return EXIT_ERROR
        if summary["counted"] or (self.gate is not None and any(b["counted"] for b in self.gate["breaches"])):
            return EXIT_BROKEN_RULE
        return EXIT_CONFORMS if summary["pass"] or summary["fail"] else EXIT_NOTHING

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

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Inverse of ``as_json``.

        Raises:
            UsageError: the data is no report of this schema.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise UsageError(f"not a kbitcheck report of schema {SCHEMA}")
        try:
            kept = {k: data[k] for k in ("tool", "environment", "subject", "blame", "strict", "complete", "facts")}
            return cls(**kept, gate=data.get("gate"), results=tuple(map(Result.from_json, data["results"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"a damaged kbitcheck report ({type(error).__name__}: {error})") from None

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)


class NonConformance(AssertionError):
    """A report that does not conform; the message lists the rules that were broken, where none is given."""

    def __init__(self, report: Report, message: str = "") -> None:
        self.report = report
        known = rules()
        lines = [
            f"{r.rule} {known[r.rule].name} [{r.case}]: {r.reason or r.failures[0].where + ': ' + r.failures[0].actual}"
            for r in report.results
            if r.status is Status.ERROR or report.counts(r)
        ]
        super().__init__(message or "\n".join(lines) or "nothing was checked")
