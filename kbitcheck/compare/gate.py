"""The gate: has a run changed against what was accepted? A pure function of a report and a ledger."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any

from kbitcheck.compare.ledger import ENVIRONMENT, Cell, Entry, Ledger
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Party, Result, Status
from kbitcheck.core.rule import rules

EVIDENCE = 160  # characters
CASES_SHOWN = 3


class Kind(StrEnum):
    """What a change is. ``FIXED`` and ``CHANGED`` come of comparing two reports only."""

    REGRESSED = "regressed"
    NEW = "new"
    LOST = "lost"
    CHANGED = "changed"
    UNEXPLAINED = "unexplained"
    EXPIRED = "expired"
    STALE = "stale"
    UNKNOWN = "unknown"
    FIXED = "fixed"


KINDS = tuple(Kind)
REMEDIES = {
    Kind.REGRESSED: "fix it, or accept it with --accept and a reason",
    Kind.NEW: "fix it, or accept it with --accept and a reason",
    Kind.LOST: "run it again, or drop it with --accept",
    Kind.STALE: "remove the entry, or let --accept do it",
    Kind.UNEXPLAINED: "write a reason",
    Kind.EXPIRED: "fix it, or set a later date",
    Kind.UNKNOWN: "correct the name, or drop it with --accept",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """One change: of these rules on these cases. ``todo`` is what to do about it.

    ``counted`` is False for what is only told: what is not the implementation's own, and what got better.
    """

    kind: Kind
    rules: tuple[str, ...]
    cases: tuple[str, ...]
    told: str
    todo: str = ""
    counted: bool = True

    @property
    def line(self) -> str:
        """All of it on one line."""
        rest = len(self.cases) - CASES_SHOWN
        cases = ", ".join(self.cases[:CASES_SHOWN]) + (f", and {rest} more" if rest > 0 else "")
        return f"{self.kind} {named(self.rules)} [{cases}]: {self.told}" + (f"; {self.todo}" if self.todo else "")

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        return {**asdict(self), "rules": list(self.rules), "cases": list(self.cases)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Breach:
        """Inverse of ``as_json``."""
        return cls(**{**data, "kind": Kind(data["kind"]), "rules": tuple(data["rules"]), "cases": tuple(data["cases"])})


def compare(report: Report, ledger: Ledger, *, today: date | None = None) -> list[Breach]:
    """Every way in which a report departs from a ledger, worst first.

    A rule left out with a reason (``--ignore``) is not missed. ``today`` decides what has expired (UTC's by default).
    """
    today = today or datetime.now(UTC).date()
    ignored = tuple(code.upper() for code in report.subject.get("ignored", {}))
    found = {(r.rule, r.case): r for r in report.results}
    expected = {
        cell: status for cell, status in ledger.expected.items() if not (ignored and cell[0].startswith(ignored))
    }
    entries = {(e.rule, case): e for e in ledger.accepted for case in e.cases}
    changes = [
        (cell, change)
        for cell in dict.fromkeys([*expected, *found])
        if (change := _change(cell, expected.get(cell), entries.get(cell), found.get(cell), report))
    ]
    kept = {cell for cell in found if cell in entries and found[cell].status is entries[cell].status}
    for entry in ledger.accepted:
        cases = tuple(case for case in entry.cases if (entry.rule, case) in kept)
        changes += [((entry.rule, case), change) for case in cases for change in _complaints(entry, ledger, today)]
    return merged(changes)


Change = tuple[Kind, str, bool]  # kind, told, counted


def _change(
    cell: Cell, expected: Status | None, entry: Entry | None, result: Result | None, report: Report
) -> Change | None:
    if result is None:
        unknown = _unknown(cell)
        if unknown:
            return Kind.UNKNOWN, unknown, True
        return Kind.LOST, f"{_was(expected)}, did not run", True
    now = result.status
    if now in (Status.FAIL, Status.ERROR):
        if expected is now and entry is not None and not _worse_party(entry, result):
            return None
        kind = Kind.REGRESSED if expected in (Status.PASS, Status.FAIL) else Kind.NEW
        return kind, f"{_was(expected)}, is {now} now: {evidence(result)}", binding(report, result)
    if entry is not None:
        return Kind.STALE, f"accepted as {entry.status}, is {now} now", True
    if now is Status.SKIP and expected is Status.PASS:
        return Kind.LOST, f"passed when accepted, is not judged now: {result.reason}", True
    return None


def _was(expected: Status | None) -> str:
    if expected is None:
        return "not in the ledger"
    return {
        Status.PASS: "passed when accepted",
        Status.SKIP: "did not apply when accepted",
        Status.FAIL: "accepted as FAIL",
        Status.ERROR: "accepted as ERROR",
    }[expected]


def _worse_party(entry: Entry, result: Result) -> bool:
    """Whether what was accepted as someone else's has become the implementation's own."""
    return result.own and entry.whose not in (None, Party.IMPLEMENTATION)


def _unknown(cell: Cell) -> str:
    """Why a cell cannot be judged at all any more, or an empty string."""
    from kbitcheck.models.sources import recipe

    code, case = cell
    if code not in rules():
        return f"there is no rule {code}"
    tiny = re.match(rf"{recipe.PREFIX}(.+?)-(nf4|fp4|int8)", case)
    if tiny and tiny[1] not in recipe.names():
        return f"there is no recipe {recipe.PREFIX}{tiny[1]}"
    return ""


def _complaints(entry: Entry, ledger: Ledger, today: date) -> Iterator[Change]:
    where = f"{ledger.name}:{entry.line}"
    if not entry.reason:
        yield Kind.UNEXPLAINED, f"{where}: accepted without a reason", True
    if entry.expires is not None and entry.expires < today:
        yield Kind.EXPIRED, f"{where}: accepted until {entry.expires}", True


def binding(report: Report, result: Result) -> bool:
    """Whether a failure or error is held against the implementation: others' faults, known findings and facts are only told."""
    if result.status is Status.ERROR:
        return True
    return result.level is not Level.INFO and not result.finding and (report.blame == "any" or result.own)


def evidence(result: Result) -> str:
    """What a failure or error saw, on one short line; the implementation's own first."""
    if not result.failures:
        return _clipped(result.reason)
    first = min(result.failures, key=lambda seen: seen.party is not Party.IMPLEMENTATION)
    rest = len(result.failures) - 1
    told = _clipped(f"{first.where}: expected {first.expected}, found {first.actual}")
    whose = "" if first.party is Party.IMPLEMENTATION else f" (the {first.party}'s)"
    return told + (f" (and {rest} more)" if rest else "") + whose


def _clipped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EVIDENCE else text[: EVIDENCE - 1] + "…"


def named(codes: Sequence[str]) -> str:
    """Codes in words: one with its name, many by number."""
    known = rules()
    if len(codes) == 1:
        return f"{codes[0]} {known[codes[0]].name}" if codes[0] in known else codes[0]
    return ", ".join(codes) if len(codes) < 5 else f"{len(codes)} rules ({codes[0]} to {codes[-1]})"


def merged(changes: Iterable[tuple[Cell, Change]], todo: Mapping[Kind, str] = REMEDIES) -> list[Breach]:
    """The same change of several cells told once, worst first: cases of one rule, then rules of the same cases."""
    by_rule: dict[tuple[str, Change], list[str]] = {}
    for (rule, case), change in changes:
        by_rule.setdefault((rule, change), []).append(case)
    by_cases: dict[tuple[Change, tuple[str, ...]], list[str]] = {}
    for (rule, change), cases in by_rule.items():
        by_cases.setdefault((change, tuple(sorted(set(cases)))), []).append(rule)
    breaches = [
        Breach(
            kind=kind,
            rules=tuple(sorted(codes)),
            cases=cases,
            told=told,
            todo=todo.get(kind, "") if counted or kind in (Kind.REGRESSED, Kind.NEW) else "",
            counted=counted,
        )
        for ((kind, told, counted), cases), codes in by_cases.items()
    ]
    return sorted(breaches, key=lambda b: (not b.counted, KINDS.index(b.kind), b.rules, b.cases))


def judge(report: Report, ledger: Ledger, *, accepted: bool = False, today: date | None = None) -> Report:
    """The report with its comparison against a ledger, which then decides its verdict and exit code.

    ``accepted`` says that the ledger was just written from it: what is still to be explained is then told, not counted.
    """
    breaches = compare(report, ledger, today=today)
    if accepted:
        breaches = [replace(b, counted=False) for b in breaches]
    expected = ledger.expected
    uncovered = sum((r.rule, r.case) not in expected for r in report.results)
    notes = [
        f"{name} {ledger.environment[name] or 'none'} when accepted, {report.environment.get(name) or 'none'} now"
        for name in ENVIRONMENT
        if name in ledger.environment and report.environment.get(name, "") != ledger.environment[name]
    ]
    if uncovered:
        notes.append(f"{uncovered} results are not in {ledger.name} yet; --accept adds them")
    entries = [{"rule": e.rule, "cases": list(e.cases), "reason": e.reason, "issue": e.issue} for e in ledger.accepted]
    return settle(report, ledger.name, breaches, notes=notes, accepted=entries)


def settle(
    report: Report,
    against: str,
    breaches: Sequence[Breach],
    *,
    notes: Sequence[str] = (),
    accepted: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """The report with what a comparison found."""
    return replace(
        report,
        gate={
            "against": against,
            "breaches": [b.as_json() for b in breaches],
            "notes": list(notes),
            "accepted": list(accepted),
        },
    )


def check_options(ledger: Ledger, report_options: Mapping[str, Any]) -> None:
    """Check that a run takes place under the options that the ledger was accepted under.

    Raises:
        UsageError: it does not, and so nothing could be compared.
    """
    for name in sorted({*ledger.options, *report_options}):
        then, now = ledger.options.get(name), report_options.get(name)
        if then != now:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{ledger.name} was accepted with {option} {'at its default' if then is None else then}, "
                f"this run has it {'at its default' if now is None else f'at {now}'}; use the same, or --accept"
            )
