"""A result's evidence in plain lines, cut where it is long."""

from __future__ import annotations

from kbitcheck.core.report import Report
from kbitcheck.core.result import Party, Result
from kbitcheck.report.parts.findings import deviations

DEVIATIONS = 3
PLACES = 8
CHARACTERS = 400


def lines(report: Report, result: Result) -> list[str]:
    """One line for each deviation, the implementation's own first, then the reason if there is one."""
    found = deviations(result.failures)
    told = []
    for seen in found[:DEVIATIONS]:
        rest = len(seen.where) - PLACES
        places = ", ".join(seen.where[:PLACES]) + (f", and {rest} more" if rest > 0 else "")
        whose = f" ({whose_it_is(report, seen.party)}: {seen.witness})" if seen.witness else ""
        told.append(
            f"{clipped(places)}: expected {clipped(seen.expected)}; found {clipped(seen.actual)}{clipped(whose)}"
        )
    if len(found) > DEVIATIONS:
        told.append(f"and {len(found) - DEVIATIONS} more deviations")
    known = f"a known finding: {result.finding}" if result.finding else result.reason
    return [*told, *([clipped(known)] if known else [])]


def whose_it_is(report: Report, party: Party) -> str:
    """Whose a deviation is, in the words of the text report."""
    if party is not Party.IMPLEMENTATION:
        return f"the {party.value}'s"
    return f"{report.subject.get('implementation', {}).get('name') or 'the implementation'}'s"


def clipped(text: str) -> str:
    """On one line, and not too long."""
    text = " ".join(text.split())
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"
