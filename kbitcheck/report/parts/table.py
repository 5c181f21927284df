"""The rows under a report: figures of the model, or of the adapter, that was judged."""

from collections.abc import Iterator

from kbitcheck.core.report import Report
from kbitcheck.report.parts import adapter, memory


def rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """A heading, the cases that have the row, and the text (``memory.rows``); nothing for other commands."""
    facts, command = report.facts.get("cases", {}), report.subject.get("command")
    if command in ("model", "audit"):
        yield from memory.rows(facts, report.subject.get("cases", {}))
    elif command == "adapter":
        yield from adapter.rows(facts)
