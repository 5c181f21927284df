"""Which rules looked at a cut of the model, and what it cost where no cut could be made."""

from collections.abc import Iterator

from kbitcheck.core.report import Report


def cuts(report: Report) -> Iterator[str]:
    """A line for each cut that the cases of a report have, and for each reason why there is none."""
    cases = report.facts.get("cases", {})
    lines: dict[str, None] = {}
    for case, facts in cases.items():
        results = [result for result in report.results if result.case == case and result.cut]
        if "cut" not in facts or not results:
            continue
        codes = ", ".join(sorted({result.rule for result in results}))
        if blocks := facts["cut"]["blocks"]:
            looked = f"{codes} looked at {blocks}, with the model's own weights"
            lines[f"{looked}, all other rules at the whole model alone"] = None
        else:
            seconds = sum(result.seconds for result in results)
            reason = facts["cut"]["reason"]
            lines[f"none ({reason}), so that {codes} looked at the whole model, for {seconds:.0f} s"] = None
    yield from lines
