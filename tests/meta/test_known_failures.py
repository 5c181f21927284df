"""The table of known failures names rules, faults and tests that exist, and the kill matrix every fault."""

import re
from pathlib import Path

import pytest

from kbitcheck.core.events import FaultTried
from kbitcheck.core.rule import rules
from kbitcheck.report.tables import kill_matrix
from kbitcheck.sabotage import faults

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "known-failures.md"
NOT_BUILT = {"KB701", "KB702", "KB704", "KB705"}


def rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| K")
    ]


def missing(row):
    """What a row names that does not exist, or that it lacks."""
    known = {fault.name for fault in faults()}
    _, _, verdict, shown = row
    wrong = [code for code in re.findall(r"KB\d{3}", verdict) if code not in rules() and code not in NOT_BUILT]
    for name in re.findall(r"`([^`]+)`", shown):
        file, _, test = name.partition("::")
        exists = (ROOT / file).is_file() and f"def {test}(" in (ROOT / file).read_text() if test else name in known
        wrong += [] if exists else [name]
    if not re.match("caught by KB|audited by KB|not covered: ", verdict):
        wrong.append(verdict)
    if verdict.startswith("caught") and not shown:
        wrong.append("nothing that shows it")
    return wrong


def test_every_failure_is_there_once():
    assert [row[0] for row in rows(TABLE.read_text(encoding="utf-8"))] == [f"K{n:02d}" for n in range(1, 71)]


@pytest.mark.parametrize("row", rows(TABLE.read_text(encoding="utf-8")), ids=lambda row: row[0])
def test_what_a_row_names_exists(row):
    assert missing(row) == []


def test_what_does_not_exist_is_seen():
    row = ["K01", "a failure", "caught by KB999", "`no_such_fault`, `tests/meta/test_known_failures.py::test_no_such`"]
    assert missing(row) == ["KB999", "no_such_fault", "tests/meta/test_known_failures.py::test_no_such"]
    assert missing(["K01", "a failure", "somehow fine", ""]) == ["somehow fine"]
    assert missing(["K01", "a failure", "caught by KB101", ""]) == ["nothing that shows it"]


def test_rules_that_are_said_not_to_be_built_are_not():
    assert not NOT_BUILT & set(rules())


def test_the_kill_matrix_is_of_todays_faults_and_rules():
    codes, kills = kill_matrix.read((ROOT / "docs" / "kill-matrix.md").read_text(encoding="utf-8"))
    assert codes == list(rules())
    assert sorted(kills) == sorted(f"{f.code} {f.name}" for f in faults() if not f.accelerator)


def test_in_the_kill_matrix_every_fault_is_killed_and_every_rule_kills():
    _, kills_by_fault = kill_matrix.read((ROOT / "docs" / "kill-matrix.md").read_text(encoding="utf-8"))
    for fault in faults():
        if not fault.accelerator:
            kills = kills_by_fault[f"{fault.code} {fault.name}"]
            assert fault.code in kills, fault.name
            assert not fault.alone or kills == {fault.code}, fault.name
    assert set(rules()) - set().union(*kills_by_fault.values()) == {f.code for f in faults() if f.accelerator}


def test_a_page_reads_back():
    event = FaultTried(
        code="KB203",
        fault="nudged",
        case="case",
        caught=True,
        reason="why",
        level="model",
        kills=("KB203", "KB209"),
    )
    assert kill_matrix.read(kill_matrix.page([event])) == (list(rules()), {"KB203 nudged": {"KB203", "KB209"}})
