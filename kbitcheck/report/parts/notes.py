"""What rules remark whatever came of them."""

from kbitcheck.core.report import Report


def notes(report: Report) -> list[str]:
    """Each remark once, in the order of the results."""
    return list(dict.fromkeys(note for result in report.results for note in result.notes))
