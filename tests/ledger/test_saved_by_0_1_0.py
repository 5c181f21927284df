"""Reports and ledgers that version 0.1.0 saved are read, and both kinds of files keep their published schemas."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import kbitcheck
from kbitcheck.compare import accept, gate
from kbitcheck.compare.gate import Breach, Kind
from kbitcheck.compare.ledger import Ledger
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.report import render
from tests.ledger.reports import INT8, NF4, STACK, report, result

DATA = Path(__file__).parents[1] / "data"
OLD_LEDGER = (DATA / "ledger-0.1.0.toml").read_text(encoding="utf-8")
OLD_REPORT = json.loads((DATA / "report-0.1.0.json").read_text(encoding="utf-8"))
SCHEMAS = Path(kbitcheck.__file__).parent / "report" / "schemas"


def validator(name: str) -> Any:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


REPORT, LEDGER = validator("report"), validator("ledger")


def test_a_report_of_0_1_0_is_read_and_rendered() -> None:
    old = Report.from_json(OLD_REPORT)
    assert old.exit_code == OLD_REPORT["exit_code"] == 1
    assert [r.rule for r in old] == ["KB101", "KB102", "KB103", "KB104", "KB105", "KB106", "KB508", "KB904"]
    (breach,) = map(Breach.from_json, OLD_REPORT["gate"]["breaches"])
    assert (breach.kind, breach.difference) == (Kind.UNEXPLAINED, "ledger.toml:20: accepted without a reason")
    for form in ("text", "markdown", "html", "junit", "sarif", "json"):
        assert "KB101" in render(old, form)


def test_a_ledger_of_0_1_0_holds_and_is_rewritten_only_where_results_changed() -> None:
    ledger = Ledger.parse(OLD_LEDGER)
    (entry,) = ledger.accepted
    assert entry.attributed_to is Party.IMPLEMENTATION
    same = Report.from_json({**OLD_REPORT, "gate": None})
    assert gate.breaches(gate.judge(same, ledger)) == []
    assert accept.accept(same, OLD_LEDGER) == OLD_LEDGER


def test_a_ledger_of_another_schema_is_refused_in_one_line_that_names_accept() -> None:
    with pytest.raises(UsageError, match="gate IMPL --ledger FILE --accept") as refused:
        Ledger.parse(OLD_LEDGER.replace("schema = 1", "schema = 0"))
    assert "\n" not in str(refused.value)


FAIL, ERROR, SKIP = Status.FAIL, Status.ERROR, Status.SKIP
OTHERS = (
    result("KB505", NF4, FAIL, STACK),
    result("KB201", NF4, ERROR, raised="ValueError: no"),
    result("KB101", INT8, SKIP),
    result("KB101", NF4, FAIL, Observation("a", "b", "c", ok=False), Observation("d", "b", "c", ok=False)),
    result("KB201", INT8, FAIL, level=Level.SHOULD, notes=("note",), finding="known"),
)
ACCEPTED = accept.accept(report(*OTHERS))


def run(*others: Result, **changes: Any) -> Report:
    return report(*others, subject={"in_process": False}, facts={"cases": {}, "seconds": 1.5}, **changes)


REPORTS = {
    "passes": run(),
    "everything": run(*OTHERS),
    "gate": gate.judge(run(*OTHERS), Ledger.parse(ACCEPTED)),
    "regressed": gate.judge(run(*OTHERS), Ledger.parse(accept.accept(report()))),
    "interrupted": run(complete=False),
    "0.1.0": Report.from_json({**OLD_REPORT, "gate": None}),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_keeps_its_schema(name: str) -> None:
    saved = json.loads(json.dumps(REPORTS[name].as_json()))
    REPORT.validate(saved)
    assert Report.from_json(saved) == REPORTS[name]


@pytest.mark.parametrize("text", [OLD_LEDGER, ACCEPTED], ids=["0.1.0", "now"])
def test_a_ledger_keeps_its_schema(text: str) -> None:
    LEDGER.validate(tomllib.loads(text))


def damaged(data: dict[str, Any], key: str, values: dict[str, Any] | None) -> dict[str, Any]:
    """A copy without ``key``, or with other values in the first of the records under it."""
    data = copy.deepcopy(data)
    if values is None:
        del data[key]
    else:
        data[key][0].update(values)
    return data


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *((key, None) for key in ("schema", "results", "blame", "environment", "summary")),
        ("results", {"status": "FAIL"}),
        ("results", {"status": "SKIP"}),
        ("results", {"level": "MAY"}),
        ("results", {"rule": "K1"}),
        ("results", {"surprise": 1}),
    ],
    ids=str,
)
def test_a_damaged_report_breaks_the_schema(key: str, values: dict[str, Any] | None) -> None:
    saved = json.loads(json.dumps(run().as_json()))
    REPORT.validate(saved)
    assert not REPORT.is_valid(damaged(saved, key, values))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("schema", None),
        ("accepted", {"status": "PASS"}),
        ("accepted", {"attributed_to": "mine"}),
        ("accepted", {"cases": []}),
        ("accepted", {"surprise": 1}),
    ],
    ids=str,
)
def test_a_damaged_ledger_breaks_the_schema(key: str, values: dict[str, Any] | None) -> None:
    assert not LEDGER.is_valid(damaged(tomllib.loads(ACCEPTED), key, values))
