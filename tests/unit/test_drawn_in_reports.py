"""A report says which conditions were drawn, of how many."""

from __future__ import annotations

from typing import Any

import pytest

from kbitcheck.core.report import Report
from kbitcheck.report.parts.conditions import drawn


def report(*cases: dict[str, Any]) -> Report:
    facts = {"cases": {str(number): each for number, each in enumerate(cases)}}
    return Report(tool="", environment={"seed": 7}, subject={}, results=(), blame="own", facts=facts)


def test_uses_are_counted_once_and_batches_are_named() -> None:
    cases = (
        {"drawn": "3 rows", "uses": {"drawn": ["a", "b"], "of": 9}},
        {"looks": "5 steps, 10 steps and hours", "uses": {"drawn": ["b", "c"], "of": 9}},
    )
    assert [*drawn(report(*cases))] == [
        "1 batch (KB310): 3 rows",
        "1 look at later steps (KB311): after 5 steps, 10 steps and hours",
        "3 of 9 later uses (KB515)",
        "another --seed than 7 draws others; --suite full draws all uses in each case",
    ]


@pytest.mark.parametrize("number", [3, 5])
def test_no_more_than_three_are_named(number: int) -> None:
    (line, _) = drawn(report(*({"drawn": f"batch {n}"} for n in range(number))))
    assert line.startswith(f"{number} batches (KB310): batch 0; batch 1; batch 2")
    assert line.endswith(", and 2 more") is (number == 5)


def test_where_nothing_was_drawn_nothing_is_said() -> None:
    assert [*drawn(report({}))] == []
