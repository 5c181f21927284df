"""Which conditions a case looks at, and what a use's outcome is beside the base's."""

from __future__ import annotations

import dataclasses
import math
import shlex
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.conditions import chosen, require_turn
from kbitcheck.core.errors import NotApplicable, Raised, Unavailable, UsageError
from kbitcheck.core.facts import UnwatchedFacts
from kbitcheck.core.result import Level, Observation, Result, Status
from kbitcheck.judge.use import same_when_unwatched, shared_across_models, still_a_module
from kbitcheck.observe.unwatched.process import importable
from kbitcheck.observe.uses.side_by_side import beside
from kbitcheck.observe.uses.subject import USES
from kbitcheck.report.parts import repro
from kbitcheck.run import suites

NAMES = [f"use {number}" for number in range(20)]


def test_the_shares_of_a_suite_are_all_conditions_and_each_once() -> None:
    for seed in (0, 1):
        shares = [chosen(f"{k}/9", NAMES, entropy="", seed=seed) for k in range(1, 10)]
        assert sorted(name for share in shares for name in share) == sorted(NAMES)
    assert chosen("1/9", NAMES, entropy="", seed=0) != chosen("1/9", NAMES, entropy="", seed=1)


def test_a_few_hang_on_the_case_and_repeat() -> None:
    few = chosen("few", NAMES, entropy="a", seed=0)
    assert few == chosen("few", NAMES, entropy="a", seed=1) != chosen("few", NAMES, entropy="b", seed=0)
    assert len(few) == 3
    assert chosen("use 3", NAMES, entropy="", seed=0) == ["use 3"]
    with pytest.raises(UsageError, match=r"no such condition: 'use3' \(did you mean use 3\?\)"):
        chosen("use3", NAMES, entropy="", seed=0)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_each_case_of_a_suite_has_one_turn_and_other_cases_have_all(seed: int) -> None:
    def has(conditions: str, turn: int) -> bool:
        try:
            require_turn(conditions, seed, turn, 3)
        except NotApplicable:
            return False
        return True

    assert [[has(f"{k}/9", turn) for turn in range(3)].count(True) for k in range(1, 10)] == [1] * 9
    assert all(has(conditions, turn) for conditions in ("", "all", "few") for turn in range(3))


def test_the_quick_suite_shares_conditions_and_the_full_one_does_not() -> None:
    quick = suites.cases(suites.QUICK, implementation="x")
    assert [spec.conditions for spec in quick] == [f"{k}/{len(quick)}" for k in range(1, len(quick) + 1)]
    assert {spec.conditions for spec in suites.cases(suites.suite_cells("full"), implementation="x")} == {"all"}
    fp8 = suites.cases(suites.QUICK, quants=["fp8"], implementation="x")
    assert {spec.model for spec in fp8} == {model for model, _, _ in suites.QUICK} - {"tiny:gpt2"}  # without a Linear
    assert suites.cases(suites.QUICK, quants=["fp8"], models=["tiny:gpt2"], implementation="x")  # if the user says so
    assert {s.conditions for s in suites.cases(suites.QUICK, models=["tiny:gpt2"], implementation="x")} == {"few"}
    assert {s.conditions for s in suites.cases((), models=["tiny:gpt2"], implementation="x")} == {""}


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("mine", "base", "ok"),
    [
        ({"x": ONES}, {"x": ONES}, True),
        ({"x": ONES * 1.5}, {"x": ONES}, False),
        ({"x": ONES * 1.01}, {"x": ONES}, True),  # the base's own rounding is more
        ({"x": ONES[:2]}, {"x": ONES}, False),
        ({"x": ONES.bfloat16()}, {"x": ONES}, False),
        ({"x": ONES.double()}, {"x": ONES}, True),
        ({"x": ONES * math.inf}, {"x": ONES * math.inf}, True),
        ({"x": ONES}, {"x": ONES * math.inf}, False),
        ({"x": ONES * math.nan}, {"x": ONES}, False),
        ({}, {"x": ONES}, False),
        ({"x": "none"}, {"x": ONES}, False),
        ({"x": "a"}, {"x": "a"}, True),
        ({"x": "a"}, {"x": "b"}, False),
        ({"x": Raised("ValueError")}, {"x": Raised("TypeError")}, True),
        ({"x": Raised("ValueError")}, {"x": ONES}, False),
        ({"": Raised("ValueError")}, {"x": ONES}, False),
        ({"": Raised("ValueError")}, {"": Raised("ValueError")}, True),
        ({"x": ONES}, {"": Raised("ValueError")}, True),
    ],
)
def test_a_use_is_right_where_it_gives_what_the_base_gives(mine: object, base: object, ok: bool) -> None:
    seen = list(beside("a use", mine, base, lambda: {"x": ONES * 1.01}))  # type: ignore[arg-type]
    facts = SimpleNamespace(conditions="all", uses=seen, compute_ulp=0.0)
    assert [o.ok for o in still_a_module(facts)] == [ok]  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [shared_across_models, same_when_unwatched])
def test_other_processes_are_looked_at_by_the_full_suite_or_where_named(rule: Any) -> None:
    same = {"x": "1"}
    seen = UnwatchedFacts(here=same, alone=same, second=same, other=same, other_second=same, kept=same, kept_after=same)
    for conditions in ("all", "processes"):
        assert all(o.ok for o in rule(SimpleNamespace(conditions=conditions, unwatched=seen)))
        for name in ("here", "second") if rule is same_when_unwatched else ("second", "other_second", "kept_after"):
            wrong = dataclasses.replace(seen, **{name: {"x": "2"}})
            broken = [o for o in rule(SimpleNamespace(conditions=conditions, unwatched=wrong)) if not o.ok]
            assert bool(broken) is not (rule is same_when_unwatched and name == "second")
    for conditions in ("", "few", "1/9"):
        with pytest.raises(NotApplicable, match="--suite full"):
            list(rule(SimpleNamespace(conditions=conditions)))


def test_nothing_but_a_module_level_function_goes_to_another_process() -> None:
    assert importable(prepare_model_for_kbit_training).module == "kbitcheck_reference.prepare"
    with pytest.raises(Unavailable, match="no function of a module"):
        importable(lambda model: model)
    with pytest.raises(Unavailable, match="no function of a module"):
        importable(partial(prepare_model_for_kbit_training))


def test_a_case_of_no_suite_looks_at_no_use() -> None:
    with pytest.raises(NotApplicable, match="kbitcheck impl"):
        list(still_a_module(SimpleNamespace(conditions="")))  # type: ignore[arg-type]


def test_the_command_under_a_failure_names_the_use() -> None:
    spec = CaseSpec(model="tiny:gpt2", quant="nf4", implementation="x:y", checkpointing="off", conditions="2/9")
    failure = Observation("the head thawed: gradient of head 0.weight", "a", "b", ok=False)
    result = Result(rule="KB515", case=spec.id, level=Level.MUST, status=Status.FAIL, examined=1, failures=(failure,))

    class Report(list[Result]):
        subject = {"command": "impl", "cases": {spec.id: spec.as_json()}}  # noqa: RUF012

    words = shlex.split(repro.command(Report([result]), spec.id, "KB515"))  # type: ignore[arg-type]
    assert words[-4:] == ["--select", "KB515", "--conditions", "the head thawed"]
    assert "the head thawed" in USES
    assert "--conditions" not in repro.command(Report([result]), spec.id, "KB304")  # type: ignore[arg-type]
    assert repro.command(Report([result]), spec.id, "KB310").endswith("--conditions 2/9")  # type: ignore[arg-type]
