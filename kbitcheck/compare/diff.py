"""Compares two reports cell by cell: what got worse, what got better, what fails in another way."""

from kbitcheck.compare.gate import Breach, Change, Kind, binding, evidence, merged
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
        if (change := _change(then.get(cell), now.get(cell), after, names))
    ]
    return merged(changes, {})


def _change(then: Result | None, now: Result | None, after: Report, names: tuple[str, str]) -> Change | None:
    a, b = names
    difference = f"{a}: {_outcome(then)}; {b}: {_outcome(now)}"
    if now is None:
        return Change(Kind.LOST, difference)
    bad = now.status in BAD
    if then is None:
        return Change(Kind.NEW, difference, bad and binding(after, now))
    if bad and (then.status not in BAD or (now.status is Status.ERROR and then.status is Status.FAIL)):
        return Change(Kind.REGRESSED, difference, binding(after, now))
    if now.status is Status.ERROR:
        return Change(Kind.CHANGED, f"{a} and {b}: {_outcome(now)}")
    if now.status is Status.FAIL and then.status is Status.FAIL and set(now.failures) != set(then.failures):
        more = {f.where for f in now.failures} - {f.where for f in then.failures}
        worse = bool(more) or (now.own and not then.own)
        return Change(Kind.REGRESSED if worse else Kind.CHANGED, difference, worse and binding(after, now))
    if then.status is Status.PASS and now.status is Status.SKIP:
        return Change(Kind.LOST, difference)
    if then.status in BAD and now.status is not then.status:
        return Change(Kind.FIXED, difference, counted=False)
    return None


def _outcome(result: Result | None) -> str:
    if result is None:
        return "did not run"
    if result.status in BAD:
        return f"{result.status}: {evidence(result)}"
    return f"{result.status}: {result.reason}" if result.reason else str(result.status)
