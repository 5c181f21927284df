"""The check model: judging, selecting, exit codes, and the JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import NotApplicable, Unavailable, UsageError
from kbitcheck.core.events import Collector, Loaded
from kbitcheck.core.facts import Facts
from kbitcheck.core.report import SCHEMA, NonConformance, Report, assemble
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import Rule, judge, rule, rules, select

GOOD = Observation("a", "1", "1", ok=True)
OWN = Observation("b", "1", "2", ok=False)
STACK = Observation("c", "1", "2", ok=False, party=Party.STACK, witness="a bare layer")


def judged(*seen: Any, **changes: Any) -> Result:
    def check(facts: Facts) -> Iterator[Observation]:
        for item in seen:
            if isinstance(item, Exception):
                raise item
            yield item

    subject = Rule(**{"code": "KB999", "name": "x", "level": Level.MUST, "check": check, **changes})
    facts = Facts()
    facts.case = "case"
    return judge(subject, facts)


@pytest.mark.parametrize(
    ("seen", "status", "party", "reason"),
    [
        ((GOOD,), Status.PASS, None, ""),
        ((GOOD, STACK), Status.FAIL, Party.STACK, ""),
        ((STACK, OWN), Status.FAIL, Party.IMPLEMENTATION, ""),
        ((), Status.ERROR, None, "vacuous: the rule examined nothing"),
        ((NotApplicable("none here"),), Status.SKIP, None, "none here"),
        ((GOOD, NotApplicable("none here")), Status.SKIP, None, "none here"),
        ((GOOD, OWN, NotApplicable("none here")), Status.FAIL, Party.IMPLEMENTATION, ""),
        ((Unavailable("no step was taken"),), Status.SKIP, None, "no step was taken"),
        ((GOOD, OWN, Unavailable("no step was taken")), Status.FAIL, Party.IMPLEMENTATION, ""),
        ((GOOD, Unavailable("preparing raised", failed=True)), Status.ERROR, None, "preparing raised"),
        ((GOOD, ValueError("one\ntwo")), Status.ERROR, None, r"ValueError: one \(test_core.py:\d+\)"),
    ],
)
def test_judging(seen: tuple[Any, ...], status: Status, party: Party | None, reason: str) -> None:
    result = judged(*seen)
    assert (result.status, result.attributed_to) == (status, party)
    assert re.fullmatch(reason, result.reason)
    assert result.own == (OWN in seen)


def test_blaming_another_needs_a_witness() -> None:
    with pytest.raises(ValueError, match="witness"):
        Observation("a", "1", "2", ok=False, party=Party.MODEL)


def test_codes_are_registered_once() -> None:
    for code in ("KB1", next(iter(rules()))):
        with pytest.raises(ValueError, match="fresh"):
            rule(code, "x", Level.MUST)(lambda facts: ())


@pytest.mark.parametrize(("code", "meant"), [("KB330", "KB303"), ("KB350", "KB305"), ("kb1o1", "KB101")])
def test_a_code_of_the_family_is_suggested(code: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean {meant}"):
        select([code])


def test_rules_are_registered_when_one_is_first_looked_up() -> None:
    code = (
        "import sys, kbitcheck; from kbitcheck.core.rule import rules; "
        "assert 'kbitcheck.judge' not in sys.modules; assert 'KB101' in rules(); assert 'kbitcheck.judge' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_report_without_its_rules_has_its_message() -> None:
    """Neither rules nor a renderer need be there."""
    code = (
        "import sys; sys.modules['kbitcheck.judge'] = sys.modules['kbitcheck.report'] = None; "
        "from kbitcheck.core import report, rule, result as r; rule.REGISTRY.load_on_demand(''); "
        "seen = r.Observation('a', '1', '2', ok=False); "
        "fail = r.Result(rule='KB101', case='c', level=r.Level.MUST, status=r.Status.FAIL, failures=(seen,)); "
        "made = report.Report(tool='t', environment={}, subject={}, results=(fail,), blame='own'); "
        "assert str(report.NonConformance(made)) == 'KB101 [c]: a: 2'"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_selecting() -> None:
    every = [r.code for r in select()]
    assert every == sorted(every)
    assert len(every) > 20
    chosen = [r.code for r in select(["kb2", "KB101"], {"KB201": "why"})]
    assert chosen == [c for c in every if c == "KB101" or (c.startswith("KB2") and c != "KB201")]
    with pytest.raises(UsageError, match="'XY'"):
        select(["XY"])


def result(status: Status, level: Level = Level.MUST, *failures: Observation) -> Result:
    return Result(rule="KB101", case="case", level=level, status=status, failures=failures)


PASS, SKIP = result(Status.PASS), result(Status.SKIP)
ERROR = Result(rule="KB101", case="case", level=Level.MUST, status=Status.ERROR, reason="it broke")
MUST, SHOULD = result(Status.FAIL, Level.MUST, OWN), result(Status.FAIL, Level.SHOULD, OWN)
INFO, OTHERS = result(Status.FAIL, Level.INFO, OWN), result(Status.FAIL, Level.MUST, STACK)


@pytest.mark.parametrize(
    ("results", "changes", "code"),
    [
        ((PASS, SKIP), {}, 0),
        ((PASS, MUST), {}, 1),
        ((PASS, SHOULD, INFO), {}, 0),
        ((PASS, SHOULD), {"strict": True}, 1),
        ((PASS, INFO), {"strict": True}, 0),
        ((OTHERS,), {}, 0),
        ((OTHERS,), {"blame": "any"}, 1),
        ((MUST, ERROR), {}, 1),
        ((SHOULD, ERROR), {}, 3),
        ((OTHERS, ERROR), {}, 3),
        ((PASS, ERROR), {}, 3),
        ((SKIP, ERROR), {}, 3),
        ((MUST, ERROR), {"complete": False}, 2),
        ((SKIP,), {}, 5),
        ((), {}, 5),
    ],
)
def test_exit_codes(results: tuple[Result, ...], changes: dict[str, Any], code: int) -> None:
    made = Report(**{"tool": "t", "environment": {}, "subject": {}, "results": results, "blame": "own", **changes})
    assert made.exit_code == code
    if code:
        with pytest.raises(NonConformance) as caught:
            made.raise_for_failures()
        assert caught.value.report is made
    else:
        made.raise_for_failures()


words = st.text(max_size=20)
few = st.sampled_from(["a", "b"])  # so that neighbours agree now and then
observations = st.builds(
    Observation,
    words,
    few,
    few,
    ok=st.booleans(),
    party=st.sampled_from(Party),
    witness=few,
    note=st.just("") | words,
    traits=st.none() | st.dictionaries(few, few, min_size=1, max_size=1),
)
results_ = st.builds(
    Result,
    rule=st.sampled_from(["KB101", "KB999"]),
    case=words,
    level=st.sampled_from(Level),
    status=st.sampled_from(Status),
    attributed_to=st.none() | st.sampled_from(Party),
    examined=st.integers(0),
    reason=words,
    failures=st.lists(observations, max_size=5).map(tuple),
    notes=st.lists(words, max_size=2).map(tuple),
    finding=words,
    seconds=st.floats(0, 1e6),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
objects = st.dictionaries(
    words,
    st.recursive(scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(words, s, max_size=3), max_leaves=5),
    max_size=3,
)
reports = st.builds(
    Report,
    tool=words,
    environment=objects,
    subject=objects,
    results=st.lists(results_, max_size=4).map(tuple),
    blame=st.sampled_from(["own", "any"]),
    strict=st.booleans(),
    complete=st.booleans(),
    facts=objects,
)


@settings(max_examples=15)  # each of dozens of values
@given(reports)
def test_a_report_survives_json(report: Report) -> None:
    text = json.dumps(report.as_json())
    back = Report.from_json(json.loads(text))
    assert back == report
    assert list(back) == list(report.results)
    assert json.dumps(back.as_json()) == text


def test_what_passed_takes_no_more_than_it_has_to_say_and_like_failures_share_an_entry() -> None:
    passed = Result(rule="KB101", case="c", level=Level.MUST, status=Status.PASS, examined=3)
    assert passed.as_json() == {"rule": "KB101", "case": "c", "level": "MUST", "status": "PASS", "examined": 3}
    alike = [dataclasses.replace(OWN, where=where) for where in "xyz"]
    told = dataclasses.replace(passed, failures=(*alike, STACK, OWN)).as_json()["failures"]
    assert [entry["where"] for entry in told] == [["x", "y", "z"], ["c"], ["b"]]
    assert told[0] == {"where": ["x", "y", "z"], "expected": "1", "actual": "2"}


def test_an_entry_with_one_place_and_all_its_fields_is_read_as_well() -> None:
    whole = {"attributed_to": None, "reason": "", "notes": [], "finding": "", "failures": [dataclasses.asdict(STACK)]}
    data = {"rule": "KB101", "case": "c", "level": "MUST", "status": "FAIL", **whole}
    assert Result.from_json(data).failures == (STACK,)


@pytest.mark.parametrize(
    "data", [[], {}, {"schema": SCHEMA + 1}, {"schema": SCHEMA}, {"schema": SCHEMA, "results": [1]}]
)
def test_damaged_reports_are_wrong_usage(data: Any) -> None:
    with pytest.raises(UsageError, match="kbitcheck report"):
        Report.from_json(data)


def test_a_report_is_assembled_in_the_order_of_its_cases() -> None:
    specs = [CaseSpec(model="m", quant=quant, implementation="f", checkpointing="off") for quant in ("nf4", "int8")]
    first, second = (dataclasses.replace(PASS, case=spec.id) for spec in specs)
    later = dataclasses.replace(first, rule="KB102")
    collector = Collector(loaded=Loaded(implementation={"name": "f"}, environment={"seed": 0}))
    collector.results = [second, first, later]
    collector.facts = {second.case: {"n": 2}, first.case: {"n": 1}}
    made = assemble(collector, {spec.id: spec.as_json() for spec in specs}, subject={"command": "impl"})
    assert list(made) == [first, later, second]
    assert list(made.facts["cases"]) == list(made.subject["cases"]) == [spec.id for spec in specs]
    assert (made.blame, made.environment, made.subject["implementation"]) == ("own", {"seed": 0}, {"name": "f"})


@pytest.mark.parametrize(("implementation", "blame"), [("reference", "any"), ("f", "own")])
def test_of_the_reference_every_failure_counts(implementation: str, blame: str) -> None:
    spec = CaseSpec(model="m", quant="nf4", implementation=implementation)
    assert assemble(Collector(), {spec.id: spec.as_json()}, subject={}).blame == blame
