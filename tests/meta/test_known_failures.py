"""The table of known failures names rules, faults and tests that exist, and the kill matrix every fault."""

import dataclasses
import re
from pathlib import Path

import pytest

from kbitcheck.core.events import FaultTried
from kbitcheck.core.rule import rules
from kbitcheck.report.tables import kill_matrix
from kbitcheck.sabotage import faults

ROOT = Path(__file__).parents[2]
MATRIX = ROOT / "docs" / "kill-matrix"
TABLE = ROOT / "docs" / "known-failures.md"


def rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| K")
    ]


def missing(row):
    """What a row names that does not exist, or that it lacks."""
    known = {fault.name for fault in faults()}
    _, _, verdict, shown = row
    wrong = [code for code in re.findall(r"KB\d{3}", verdict) if code not in rules()]
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


def test_the_kill_matrix_is_of_todays_faults_and_rules():
    rows = kill_matrix.read(MATRIX)
    assert sorted(f"{row.code} {row.fault}" for row in rows) == sorted(f"{f.code} {f.name}" for f in faults())
    assert {code for row in rows for code in row.kills or ()} <= set(rules())


def test_in_the_kill_matrix_every_fault_is_killed_and_every_rule_kills():
    rows = {f"{row.code} {row.fault}": row for row in kill_matrix.read(MATRIX)}
    for fault in faults():
        if not fault.accelerator:
            row = rows[f"{fault.code} {fault.name}"]
            assert fault.code in (row.kills or ()), fault.name
            assert not fault.alone or row.kills == (fault.code,), fault.name
    caught = {code for row in rows.values() for code in row.kills or ()}
    assert set(rules()) - caught <= {f.code for f in faults() if f.accelerator}


def test_what_a_selftest_tried_reads_back_and_is_a_page(tmp_path):
    nudged = FaultTried(
        code="KB203",
        fault="nudged",
        case="case",
        caught=True,
        reason="why",
        level="model",
        kills=("KB203", "KB209"),
    )
    elsewhere = dataclasses.replace(nudged, code="KB602", fault="large", kills=None, reason="needs an accelerator")
    kill_matrix.write(tmp_path, [elsewhere, nudged])
    rows = kill_matrix.read(tmp_path)
    assert rows == [
        kill_matrix.Row("KB203", "nudged", "model", alone=False, kills=("KB203", "KB209")),
        kill_matrix.Row("KB602", "large", "model", alone=False, kills=None, reason="needs an accelerator"),
    ]
    page = kill_matrix.page(rows)
    row = next(line for line in page.splitlines() if line.startswith("203 m  nudged"))
    assert (row.count("#"), row.count("x")) == (1, 1)
    assert "1 of 1 faults are caught by the rule that must." in page
    assert "Not judged on the machine that tried them: KB602 large: needs an accelerator." in page
