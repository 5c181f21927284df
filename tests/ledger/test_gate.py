"""What a report may do against a ledger, and what it is called."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from typing import Any

import pytest

from kbitcheck.compare import accept as acceptance
from kbitcheck.compare import diff, gate
from kbitcheck.compare.gate import Kind
from kbitcheck.compare.ledger import Ledger
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Party, Status
from tests.ledger.reports import INT8, NF4, OWN, STACK, report, result

TODAY = date(2026, 6, 1)
FAIL, ERROR, SKIP, PASS = Status.FAIL, Status.ERROR, Status.SKIP, Status.PASS


def accepted(*other: Any, reason: str = "known") -> Ledger:
    text = acceptance.accept(report(*other)).replace('reason = ""', f'reason = "{reason}"')
    return Ledger.parse(text, name="l.toml")


def changes(*compared: Any, **options: Any) -> list[gate.Breach]:
    return gate.breaches(gate.judge(*compared, **options))


def kinds(found: Report, ledger: Ledger) -> list[tuple[str, str, bool]]:
    return [(b.kind.value, b.rules[0], b.counted) for b in changes(found, ledger, today=TODAY)]


CHANGES = [
    (PASS, PASS, None, 0),
    (FAIL, FAIL, None, 0),
    (ERROR, ERROR, None, 0),
    (SKIP, SKIP, None, 0),
    (PASS, FAIL, "regressed", 1),
    (PASS, ERROR, "regressed", 3),
    (PASS, SKIP, "lost", 1),
    (SKIP, PASS, None, 0),
    (SKIP, FAIL, "new", 1),
    (SKIP, ERROR, "new", 3),
    (FAIL, PASS, "stale", 1),
    (FAIL, SKIP, "stale", 1),
    (FAIL, ERROR, "regressed", 3),
    (ERROR, FAIL, "new", 1),
    (ERROR, PASS, "stale", 1),
]


@pytest.mark.parametrize(("then", "now", "kind", "code"), CHANGES, ids=lambda x: str(x))
def test_each_change_has_its_name_and_exit_code(then: Status, now: Status, kind: str | None, code: int) -> None:
    ledger = accepted(result("KB505", NF4, then))
    found = report(result("KB505", NF4, now))
    assert kinds(found, ledger) == ([(kind, "KB505", True)] if kind else [])
    assert gate.judge(found, ledger, today=TODAY).exit_code == code


def test_a_breach_decides_before_what_could_not_be_judged() -> None:
    """Of two cells, one could not be judged and is not accepted; the other decides."""
    error = result("KB201", NF4, ERROR)
    for now, code in ((PASS, 3), (FAIL, 1)):
        assert gate.judge(report(error, result("KB505", NF4, now)), accepted(), today=TODAY).exit_code == code


def test_what_did_not_run_is_lost_and_told_once_for_all_its_rules() -> None:
    ledger = accepted()
    breaches = changes(report(drop=tuple((c, NF4) for c in ("KB101", "KB201", "KB505"))), ledger)
    assert [(b.kind, b.rules, b.cases) for b in breaches] == [(Kind.LOST, ("KB101", "KB201", "KB505"), (NF4,))]
    assert "did not run; run it again, or drop it with --accept" in breaches[0].line
    assert kinds(report(drop=(("KB505", INT8),)), ledger) == [("lost", "KB505", True)]


def test_what_a_run_was_not_asked_for_names_who_left_it_out() -> None:
    """A case is left out by one thing, a rule by another, and a cell that was asked for and did not run is lost."""
    missing = report(drop=(("KB101", INT8), ("KB201", INT8), ("KB505", INT8), ("KB505", NF4), ("KB201", NF4)))
    asked = gate.Selection(rules={"KB101", "KB201"}, cases={NF4}, rules_by="select in a file", cases_by="--quant")
    found = [(b.kind, b.rules, b.cases, b.difference) for b in changes(missing, accepted(), selection=asked)]
    assert found == [
        (Kind.LOST, ("KB201",), (NF4,), "was PASS in the ledger, did not run"),
        (Kind.UNSELECTED, ("KB101", "KB201", "KB505"), (INT8,), "left out by --quant"),
        (Kind.UNSELECTED, ("KB505",), (NF4,), "left out by select in a file"),
    ]
    assert gate.judge(missing, accepted(), selection=asked).exit_code == 1


@pytest.mark.parametrize(
    ("worse", "todo"),
    [
        ((), "remove the entry, or let --accept do it"),
        ((gate.Change(Kind.REGRESSED, "now FAIL"),), "remove the entry, if it is stale once nothing is worse"),
        ((gate.Change(Kind.NEW, "of the stack", counted=False),), "remove the entry, or let --accept do it"),
    ],
)
def test_nothing_advises_to_accept_what_got_worse_with_a_stale_entry(worse: tuple[gate.Change, ...], todo: str) -> None:
    stale = (("KB505", NF4), gate.Change(Kind.STALE, "was accepted as FAIL, now PASS"))
    merged = gate.merged([stale, *((("KB101", NF4), change) for change in worse)])
    assert [b.todo for b in merged if b.kind is Kind.STALE] == [todo]


def test_an_ignored_rule_is_not_missed() -> None:
    missing = report(drop=(("KB505", INT8), ("KB505", NF4)), subject={"ignored": {"kb5": "slow"}})
    assert kinds(missing, accepted()) == []


def test_a_cell_that_no_ledger_knows_is_new_when_it_fails_and_told_when_it_passes() -> None:
    ledger = accepted()
    fresh = report(result("KB102", NF4, FAIL), result("KB103", NF4))
    judged = gate.judge(fresh, ledger)
    assert kinds(fresh, ledger) == [("new", "KB102", True)]
    assert judged.gate is not None
    assert judged.gate["notes"] == ["2 results are not in l.toml yet; --accept adds them"]


def test_an_entry_needs_a_reason_and_holds_until_it_expires() -> None:
    failing = report(result("KB505", NF4, FAIL))
    assert kinds(failing, accepted(result("KB505", NF4, FAIL), reason=" ")) == [("unexplained", "KB505", True)]
    ledger = accepted(result("KB505", NF4, FAIL))
    entry = ledger.accepted[0]
    for expires, expected in ((date(2026, 5, 31), [("expired", "KB505", True)]), (TODAY, [])):
        dated = dataclasses.replace(ledger, accepted=(dataclasses.replace(entry, expires=expires),))
        assert kinds(failing, dated) == expected


def test_a_rule_or_recipe_that_is_no_more_is_unknown() -> None:
    text = acceptance.accept(report()).replace('"KB505"', '"KB899"').replace("tiny:llama-nf4", "tiny:lama-nf4")
    breaches = changes(report(), Ledger.parse(text), recipes=["llama"])
    told = [b.difference for b in breaches if b.kind is Kind.GONE]
    assert "there is no rule KB899" in told
    assert "there is no recipe tiny:lama" in told
    assert not [b for b in breaches if b.kind is Kind.LOST]


def test_what_is_not_the_implementations_own_is_told_and_not_counted() -> None:
    ledger = accepted()
    others = report(result("KB505", NF4, FAIL, STACK), result("KB201", NF4, FAIL, level=Level.INFO))
    assert kinds(others, ledger) == [("regressed", "KB201", False), ("regressed", "KB505", False)]
    assert gate.judge(others, ledger).exit_code == 0
    any_blame = dataclasses.replace(others, blame="any")
    assert kinds(any_blame, ledger)[0] == ("regressed", "KB505", True)


def test_a_stacks_failure_that_becomes_the_implementations_has_regressed() -> None:
    ledger = accepted(result("KB505", NF4, FAIL, STACK))
    assert ledger.accepted[0].attributed_to is Party.STACK
    assert kinds(report(result("KB505", NF4, FAIL, STACK)), ledger) == []
    assert kinds(report(result("KB505", NF4, FAIL, OWN)), ledger) == [("regressed", "KB505", True)]


def test_a_line_says_what_where_and_what_to_do() -> None:
    (breach,) = changes(report(result("KB505", NF4, FAIL)), accepted())
    assert breach.line == (
        f"regressed KB505 one-hook-and-removable [{NF4}]: was PASS in the ledger, now FAIL: model.norm: expected "
        "float32, found float16; fix it, or accept it with --accept and a reason"
    )
    assert gate.Breach.from_json(json.loads(json.dumps(breach.as_json()))) == breach


def test_an_interrupted_run_is_interrupted_and_an_empty_one_checked_nothing() -> None:
    ledger = accepted()
    assert gate.judge(report(complete=False), ledger).exit_code == 2
    skips = [result(c, case, SKIP) for c in ("KB101", "KB201", "KB505") for case in (INT8, NF4)]
    assert gate.judge(report(*skips), Ledger.parse("schema = 1")).exit_code == 5


def test_other_options_cannot_be_compared() -> None:
    ledger = dataclasses.replace(accepted(), options={"profile": "qlora"})
    with pytest.raises(UsageError, match="accepted with --profile qlora, this run has it at its default"):
        gate.check_options(ledger, {})
    gate.check_options(ledger, {"profile": "qlora"})


def test_other_versions_are_told() -> None:
    judged = gate.judge(report(environment={"torch": "2.14.0"}), accepted())
    assert judged.gate is not None
    assert "torch 2.13.0 when accepted, 2.14.0 now" in judged.gate["notes"]


MORE = dataclasses.replace(OWN, where="lm_head")
DIFFS = [
    ((PASS,), (PASS,), None, False),
    ((PASS,), (FAIL,), "regressed", True),
    ((PASS,), (FAIL, STACK), "regressed", False),
    ((PASS,), (ERROR,), "regressed", True),
    ((FAIL,), (ERROR,), "regressed", True),
    ((PASS,), (SKIP,), "lost", True),
    ((FAIL,), (PASS,), "fixed", False),
    ((ERROR,), (FAIL,), "fixed", False),
    ((ERROR,), (ERROR,), "changed", True),
    ((FAIL, OWN), (FAIL, dataclasses.replace(OWN, actual="bfloat16")), "changed", False),
    ((FAIL, OWN, MORE), (FAIL, OWN), "changed", False),
    ((FAIL, OWN), (FAIL, OWN, MORE), "regressed", True),
    ((FAIL, STACK), (FAIL, OWN), "regressed", True),
]


@pytest.mark.parametrize(("then", "now", "kind", "counted"), DIFFS)
def test_two_reports_are_compared_cell_by_cell(then: Any, now: Any, kind: str | None, counted: bool) -> None:
    found = diff.compare(report(result("KB505", NF4, *then)), report(result("KB505", NF4, *now)))
    assert [(b.kind.value, b.rules, b.counted) for b in found] == ([(kind, ("KB505",), counted)] if kind else [])


def test_cells_of_one_report_alone_are_lost_or_new() -> None:
    less, more = report(drop=(("KB505", NF4),)), report(result("KB102", NF4, FAIL))
    assert [(b.kind.value, b.rules, b.counted) for b in diff.compare(less, more)] == [
        ("new", ("KB102",), True),
        ("new", ("KB505",), False),
    ]
    assert [(b.kind.value, b.rules) for b in diff.compare(more, less)] == [
        ("lost", ("KB102",)),
        ("lost", ("KB505",)),
    ]
