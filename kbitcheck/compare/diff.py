"""Compares two reports cell by cell: what got worse, what got better, what fails in another way."""

from collections.abc import Iterator

from kbitcheck.compare.gate import Breach, Change, Kind, binding, evidence, merged
from kbitcheck.compare.ledger import Cell
from kbitcheck.core.report import Report
from kbitcheck.core.result import Result, Status

BAD = (Status.FAIL, Status.ERROR)


def compare(before: Report, after: Report, *, names: tuple[str, str] = ("before", "after")) -> list[Breach]:
    """The changes from one report to another, worst first; changes for the worse are counted.

    ``names`` are those of the two reports. A cell that neither could judge (ERROR) is counted too: nothing was compared.
    """
    then = {(r.rule, r.case): r for r in before.results}
    now = {(r.rule, r.case): r for r in after.results}
    changes = [
        (cell, change)
        for cell in dict.fromkeys([*then, *now])
        for change in _changes(cell, then.get(cell), now.get(cell), after, names)
    ]
    return merged(changes, {})


def _changes(
    cell: Cell, then: Result | None, now: Result | None, after: Report, names: tuple[str, str]
) -> Iterator[Change]:
    a, b = names
    if now is None:
        yield Change(Kind.LOST, f"{a}: {_outcome(then)}; {b}: did not run")
    elif then is None:
        worse = now.status in BAD
        yield Change(Kind.NEW, f"{a}: did not run; {b}: {_outcome(now)}", worse and binding(after, now))
    elif now.status in BAD and (then.status not in BAD or (now.status is Status.ERROR and then.status is Status.FAIL)):
        yield Change(Kind.REGRESSED, f"{a}: {_outcome(then)}; {b}: {_outcome(now)}", binding(after, now))
    elif now.status is Status.ERROR:
        yield Change(Kind.CHANGED, f"{a} and {b}: {_outcome(now)}")
    elif now.status is Status.FAIL and then.status is Status.FAIL and set(now.failures) != set(then.failures):
        more = {f.where for f in now.failures} - {f.where for f in then.failures}
        worse = bool(more) or (now.own and not then.own)
        kind = Kind.REGRESSED if worse else Kind.CHANGED
        yield Change(kind, f"{a}: {_outcome(then)}; {b}: {_outcome(now)}", worse and binding(after, now))
    elif then.status is Status.PASS and now.status is Status.SKIP:
        yield Change(Kind.LOST, f"{a}: PASS; {b}: {_outcome(now)}")
    elif then.status in BAD and now.status is not then.status:
        yield Change(Kind.FIXED, f"{a}: {_outcome(then)}; {b}: {_outcome(now)}", counted=False)


def _outcome(result: Result | None) -> str:
    if result is None:
        return "did not run"
    if result.status in BAD:
        return f"{result.status}: {evidence(result)}"
    return f"{result.status}: {result.reason}" if result.reason else str(result.status)
