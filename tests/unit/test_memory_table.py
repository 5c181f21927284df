"""The memory table of several cases: what is under a heading stays under it, and says whose it is."""

import pytest

from kbitcheck.report.parts import memory

SPECS = {case: {"model": "tiny:llama", "quant": case, "checkpointing": "default"} for case in ("nf4", "int8")}
TABLES = {
    "nf4": [("weights", "1 KiB"), ("at the peak", "2 adapters"), ("", "1 workspace"), ("drawn", "3 rows")],
    "int8": [
        ("weights", "1 KiB"),
        ("at the peak", "4 weights"),
        ("", "1 workspace"),
        ("", "0 others"),
        ("drawn", "5 rows"),
    ],
}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_table", lambda facts: TABLES[facts["name"]])


def test_each_case_has_its_own_rows_under_a_heading() -> None:
    rows = [*memory.rows({case: {"name": case} for case in TABLES}, SPECS)]
    assert rows == [
        ("weights", "", "1 KiB"),
        ("at the peak", "nf4", "2 adapters"),
        ("", " ", "1 workspace"),
        ("", "int8", "4 weights"),
        ("", " ", "1 workspace"),
        ("", " ", "0 others"),
        ("drawn", "nf4", "3 rows"),
        ("", "int8", "5 rows"),
    ]


def test_one_case_needs_no_names() -> None:
    assert [of for _, of, _ in memory.rows({"nf4": {"name": "nf4"}}, SPECS)] == ["", "", "", ""]
