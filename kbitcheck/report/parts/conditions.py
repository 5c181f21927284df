"""Which conditions a run has drawn, of those that there are."""

from collections.abc import Iterator

from kbitcheck.core.report import Report

SHOWN = 3


def drawn(report: Report) -> Iterator[str]:
    """Lines on the batches, the many steps and the later uses that the cases looked at; none where none did."""
    cases = report.facts.get("cases", {}).values()
    if batches := [facts["drawn"] for facts in cases if "drawn" in facts]:
        more = f", and {len(batches) - SHOWN} more" if len(batches) > SHOWN else ""
        yield f"{_number(len(batches), 'batch', 'batches')} (KB310): {'; '.join(batches[:SHOWN])}{more}"
    if looks := [facts["looks"] for facts in cases if "looks" in facts]:
        more = f", and {len(looks) - SHOWN} more" if len(looks) > SHOWN else ""
        yield f"{_number(len(looks), 'look', 'looks')} at later steps (KB311): after {'; '.join(looks[:SHOWN])}{more}"
    used = [facts["uses"] for facts in cases if "uses" in facts]
    if used:
        names = {name for each in used for name in each["drawn"]}
        yield f"{len(names)} of {max(each['of'] for each in used)} later uses (KB515)"
    if batches or looks or used:
        yield f"another --seed than {report.environment.get('seed', 0)} draws others; --suite full draws all uses in each case"


def _number(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
