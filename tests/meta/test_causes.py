"""A rule that explains another one is broken together with it, as the kill matrix shows, and is told first."""

import dataclasses
from pathlib import Path

import pytest

from kbitcheck.core.causes import EXPLAINS, causes
from kbitcheck.core.report import Report
from kbitcheck.core.result import Observation, Party, Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.report import text, verdict
from kbitcheck.report.parts.broken_rules import broken_rules
from kbitcheck.report.tables import kill_matrix

MATRIX = Path(__file__).parents[2] / "docs" / "kill-matrix"


def result(code, *, case="a", party=Party.IMPLEMENTATION):
    witness = "" if party is Party.IMPLEMENTATION else "a witness"
    failure = Observation("somewhere", "one", "other", ok=False, party=party, witness=witness)
    level = rules()[code].level
    return Result(rule=code, level=level, status=Status.FAIL, case=case, reason="", examined=1, failures=(failure,))


def report(*results):
    return Report(tool="kbitcheck", environment={}, subject={"command": "impl"}, results=results, blame="any")


def test_each_cause_is_broken_together_with_what_it_explains():
    kills = [set(row.kills or ()) for row in kill_matrix.read(MATRIX)]
    pairs = [(cause, effect) for cause, effects in EXPLAINS.items() for effect in effects]
    assert [pair for pair in pairs if not any(set(pair) <= killed for killed in kills)] == []


def test_no_cause_follows_from_what_it_explains():
    order = [*EXPLAINS]
    assert [
        (cause, effect)
        for cause, effects in EXPLAINS.items()
        for effect in effects & EXPLAINS.keys()
        if order.index(effect) < order.index(cause)
    ] == []


def test_the_deepest_cause_is_named():
    assert causes([result("KB304"), result("KB302"), result("KB301")]) == {"KB304": "KB301", "KB302": "KB301"}


def test_eval_mode_is_the_cause_of_the_cache_that_is_made_in_it():
    assert causes(result(code) for code in ("KB408", "KB716", "KB718")) == {"KB408": "KB718", "KB716": "KB718"}
    assert causes(result(code) for code in ("KB408", "KB716")) == {"KB408": "KB716"}


@pytest.mark.parametrize("other", [{"case": "b"}, {"party": Party.STACK}])
def test_what_breaks_elsewhere_or_by_another_party_is_no_cause(other):
    assert causes([result("KB304"), result("KB301", **other)]) == {}
    assert causes([result("KB304"), result("KB301"), result("KB301", **other)]) == {"KB304": "KB301"}


def test_causes_are_told_before_what_follows():
    broken = report(*(result(code) for code in ("KB105", "KB302", "KB403", "KB301", "KB501")))
    assert [(rule.codes[0], rule.cause) for rule in broken_rules(broken)] == [
        ("KB301", ""), ("KB501", ""), ("KB105", "KB301"), ("KB302", "KB301"), ("KB403", "KB301"),
    ]  # fmt: skip
    page = text.render(broken, width=100)
    assert page.count("Do: mend KB301 first: what breaks it breaks this rule, too") == 3
    assert "5 rules broken (3 follow from others)" in verdict(broken)


def test_what_is_no_failure_causes_nothing():
    assert causes([result("KB304"), dataclasses.replace(result("KB301"), status=Status.PASS, failures=())]) == {}
