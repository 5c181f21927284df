"""The gate: how a report differs from a ledger. A pure function of the two."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any, Self

from kbitcheck.compare.ledger import ENVIRONMENT, Cell, Entry, Ledger
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Party, Result, Status
from kbitcheck.core.rule import rules

EVIDENCE = 160  # characters
CASES_SHOWN = 3
TINY = "tiny:"  # begins the cases of models that a recipe draws


class Kind(StrEnum):
    """The kinds of changes. ``FIXED`` and ``CHANGED`` occur between two reports only."""

    REGRESSED = "regressed"
    NEW = "new"
    LOST = "lost"
    UNSELECTED = "unselected"
    CHANGED = "changed"
    UNEXPLAINED = "unexplained"
    EXPIRED = "expired"
    STALE = "stale"
    GONE = "unknown"
    FIXED = "fixed"


REMEDIES = {
    Kind.REGRESSED: "fix it, or accept it with --accept and a reason",
    Kind.NEW: "fix it, or accept it with --accept and a reason",
    Kind.LOST: "run it again, or drop it with --accept",
    Kind.UNSELECTED: "select it again, or drop it with --accept",
    Kind.STALE: "remove the entry, or let --accept do it",
    Kind.UNEXPLAINED: "write a reason",
    Kind.EXPIRED: "fix it, or set a later date",
    Kind.GONE: "correct the name, or drop it with --accept",
}
# Where something got worse, which --accept would accept, too, and which may be why an entry is stale.
AFTER_WORSE = {Kind.STALE: "remove the entry, if it is stale once nothing is worse"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """One change of these rules on these cases. ``difference`` says what changed, ``todo`` what to do about it.

    ``counted`` is False for a change that is only reported: what others are to blame for, and what got better.
    """

    kind: Kind
    rules: tuple[str, ...]
    cases: tuple[str, ...]
    difference: str
    todo: str = ""
    counted: bool = True

    @property
    def title(self) -> str:
        """The rules in words: one with its name, many by number."""
        if len(self.rules) == 1:
            return rules().title(self.rules[0])
        many = f"{len(self.rules)} rules ({self.rules[0]} to {self.rules[-1]})"
        return ", ".join(self.rules) if len(self.rules) < 5 else many

    @property
    def line(self) -> str:
        """All of it on one line."""
        rest = len(self.cases) - CASES_SHOWN
        cases = ", ".join(self.cases[:CASES_SHOWN]) + (f", and {rest} more" if rest > 0 else "")
        return f"{self.kind} {self.title} [{cases}]: {self.difference}" + (f"; {self.todo}" if self.todo else "")

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        return {**asdict(self), "rules": list(self.rules), "cases": list(self.cases)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``; reads the form of 0.1.0 too, which has ``told`` for ``difference``."""
        fields = {"difference" if name == "told" else name: value for name, value in data.items()}
        kind, codes, cases = Kind(fields["kind"]), tuple(fields["rules"]), tuple(fields["cases"])
        return cls(**{**fields, "kind": kind, "rules": codes, "cases": cases})


@dataclass(frozen=True, slots=True)
class Selection:
    """The rules and cases that a run was asked for, and by what: options, or keys of a configuration."""

    rules: Collection[str]
    cases: Collection[str]
    rules_by: str
    cases_by: str

    def without(self, cell: Cell) -> str:
        """What leaves a cell out of the run; empty for one that belongs to it."""
        rule, case = cell
        return self.cases_by if case not in self.cases else self.rules_by if rule not in self.rules else ""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one cell; equal changes are merged to one ``Breach``."""

    kind: Kind
    difference: str
    counted: bool = True


def breaches(report: Report) -> list[Breach]:
    """The changes that a report's comparison yielded; none where it was not compared."""
    return list(map(Breach.from_json, report.gate["breaches"])) if report.gate is not None else []


def _changes(
    report: Report,
    ledger: Ledger,
    today: date,
    recipes: Collection[str],
    left_out: Iterable[Cell],
    selection: Selection | None,
) -> Iterator[tuple[Cell, Change]]:
    ignored = tuple(code.upper() for code in report.subject.get("ignored", {}))
    results = {(r.rule, r.case): r for r in report.results}
    unmissed = {*left_out} - results.keys()
    expected = {
        c: status for c, status in ledger.expected.items() if not c[0].startswith(ignored) and c not in unmissed
    }
    entries = {(e.rule, case): e for e in ledger.accepted for case in e.cases}
    for cell in dict.fromkeys([*expected, *results]):
        entry, result = entries.get(cell), results.get(cell)
        if result is None:
            yield cell, _missing(cell, expected.get(cell), recipes, selection)
        elif change := _change(expected.get(cell), entry, result, report):
            yield cell, change
        if entry and result and result.status is entry.status:
            yield from ((cell, complaint) for complaint in _complaints(entry, ledger, today))


def _missing(cell: Cell, expected: Status | None, recipes: Collection[str], selection: Selection | None) -> Change:
    if gone := _gone(cell, recipes):
        return Change(Kind.GONE, gone)
    if selection and (by := selection.without(cell)):
        return Change(Kind.UNSELECTED, f"left out by {by}")
    return Change(Kind.LOST, f"{_was(expected)}, did not run")


def _change(expected: Status | None, entry: Entry | None, result: Result, report: Report) -> Change | None:
    now = result.status
    if now in (Status.FAIL, Status.ERROR):
        others = entry is not None and entry.attributed_to not in (None, Party.IMPLEMENTATION)
        if entry is not None and entry.status is now and not (others and result.own):
            return None
        kind = Kind.REGRESSED if expected in (Status.PASS, Status.FAIL) else Kind.NEW
        return Change(kind, f"{_was(expected)}, now {now}: {evidence(result)}", binding(report, result))
    if entry is not None:
        return Change(Kind.STALE, f"was accepted as {entry.status}, now {now}")
    if now is Status.SKIP and expected is Status.PASS:
        return Change(Kind.LOST, f"{_was(expected)}, not judged now: {result.reason}")
    return None


def _was(expected: Status | None) -> str:
    if expected is None:
        return "not in the ledger"
    passed = expected in (Status.PASS, Status.SKIP)
    return f"was {expected} in the ledger" if passed else f"was accepted as {expected}"


def _gone(cell: Cell, recipes: Collection[str]) -> str:
    """Why a cell can never be judged again, or an empty string."""
    code, case = cell
    if code not in rules():
        return f"there is no rule {code}"
    recipe = case.removeprefix(TINY).partition("-")[0]
    if recipes and case.startswith(TINY) and recipe not in recipes:
        return f"there is no recipe {TINY}{recipe}"
    return ""


def _complaints(entry: Entry, ledger: Ledger, today: date) -> Iterator[Change]:
    where = f"{ledger.name}:{entry.line}"
    if not entry.reason:
        yield Change(Kind.UNEXPLAINED, f"{where}: accepted without a reason")
    if entry.expires is not None and entry.expires < today:
        yield Change(Kind.EXPIRED, f"{where}: accepted until {entry.expires}")


def binding(report: Report, result: Result) -> bool:
    """True if a failure or error counts against the implementation: not other parties', a finding's or an INFO's."""
    if result.status is Status.ERROR:
        return True
    return result.level is not Level.INFO and not result.finding and (report.blame == "any" or result.own)


def evidence(result: Result) -> str:
    """The first failure, or the reason of an error, on one short line; the implementation's failures come first."""
    if not result.failures:
        return _clipped(result.reason)
    first = min(result.failures, key=lambda failure: failure.party is not Party.IMPLEMENTATION)
    rest = len(result.failures) - 1
    text = _clipped(f"{first.where}: expected {first.expected}, found {first.actual}")
    party = "" if first.party is Party.IMPLEMENTATION else f" (attributed to the {first.party})"
    return text + (f" (and {rest} more)" if rest else "") + party


def _clipped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EVIDENCE else text[: EVIDENCE - 1] + "…"


def merged(changes: Iterable[tuple[Cell, Change]], todo: Mapping[Kind, str] = REMEDIES) -> list[Breach]:
    """Equal changes of several cells in one breach, worst first: cases of one rule, then rules of the same cases."""
    changes = list(changes)
    if any(change.counted and change.kind in (Kind.REGRESSED, Kind.NEW) for _, change in changes):
        todo = {kind: AFTER_WORSE.get(kind, words) for kind, words in todo.items()}
    by_rule: dict[tuple[str, Change], list[str]] = {}
    for (rule, case), change in changes:
        by_rule.setdefault((rule, change), []).append(case)
    by_cases: dict[tuple[Change, tuple[str, ...]], list[str]] = {}
    for (rule, change), cases in by_rule.items():
        by_cases.setdefault((change, tuple(sorted(set(cases)))), []).append(rule)
    every = [
        Breach(**asdict(change), rules=tuple(sorted(codes)), cases=cases, todo=todo.get(change.kind, ""))
        for (change, cases), codes in by_cases.items()
    ]
    return sorted(every, key=lambda b: (not b.counted, list(Kind).index(b.kind), b.rules, b.cases))


def judge(
    report: Report,
    ledger: Ledger,
    *,
    accepted: bool = False,
    today: date | None = None,
    recipes: Collection[str] = (),
    left_out: Iterable[Cell] = (),
    selection: Selection | None = None,
) -> Report:
    """The report with its comparison against a ledger, which then decides its verdict and exit code.

    ``accepted`` says that the ledger was just written from the report: entries without a reason are then reported, not
    counted. ``today`` decides which entries have expired (default: the date in UTC). ``recipes`` are the names of the
    tiny models that exist (default: not checked). Neither ignored rules nor cells in ``left_out`` are missed. Cells outside the
    ``selection`` (default: not checked) are named so.
    """
    changes = merged(_changes(report, ledger, today or datetime.now(UTC).date(), recipes, left_out, selection))
    if accepted:
        changes = [replace(change, counted=False) for change in changes]
    expected = ledger.expected
    notes = [
        f"{name} {ledger.environment[name] or 'none'} when accepted, {report.environment.get(name) or 'none'} now"
        for name in ENVIRONMENT
        if name in ledger.environment and report.environment.get(name, "") != ledger.environment[name]
    ]
    judged = [r for r in report.results if r.status is not Status.SKIP]
    if uncovered := sum((r.rule, r.case) not in expected for r in judged):
        notes.append(f"{uncovered} results are not in {ledger.name} yet; --accept adds them")
    entries = [{"rule": e.rule, "cases": list(e.cases), "reason": e.reason, "issue": e.issue} for e in ledger.accepted]
    return settle(report, ledger.name, changes, notes=notes, accepted=entries)


def settle(
    report: Report,
    against: str,
    changes: Sequence[Breach],
    *,
    notes: Sequence[str] = (),
    accepted: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """The report with the breaches of a comparison, which then decide its verdict and exit code."""
    plain = [breach.as_json() for breach in changes]
    gate = {"against": against, "breaches": plain, "notes": list(notes), "accepted": list(accepted)}
    return replace(report, gate=gate)


def check_options(ledger: Ledger, report_options: Mapping[str, Any]) -> None:
    """Check that a run has the options that the ledger was accepted with.

    Raises:
        UsageError: it has others, so that nothing could be compared.
    """
    for name in sorted({*ledger.options, *report_options}):
        then, now = ledger.options.get(name), report_options.get(name)
        if then != now:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{ledger.name} was accepted with {option} {'at its default' if then is None else then}, "
                f"this run has it {'at its default' if now is None else f'at {now}'}; use the same, or --accept"
            )
