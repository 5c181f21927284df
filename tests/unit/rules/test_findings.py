"""A finding explains a failure only under its condition, and excuses only whom it says."""

from __future__ import annotations

from typing import Any

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.finding import Condition, Finding
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.judge.conditions import settle
from kbitcheck.run.findings import findings, settler

ENVIRONMENT = {"device": "cpu", "cpu_capability": "AVX512"}
RAGGED = Observation(
    "q_proj (unpacked by the stack)", "the weight", "off by 25%", ok=False, party=Party.STACK, witness="a bare layer",
    traits={"columns": 96, "dtype": "float32"},
)  # fmt: skip


def spec(quant: str = "nf4", implementation: str = "reference", checkpointing: Any = "default") -> CaseSpec:
    return CaseSpec(model="m", quant=quant, implementation=implementation, checkpointing=checkpointing)


def failed(case: CaseSpec, *failures: Observation, rule: str = "KB303") -> Result:
    return Result(rule=rule, case=case.id, level=Level.MUST, status=Status.FAIL, failures=failures)


def observation(**changes: Any) -> Observation:
    fields = {name: getattr(RAGGED, name) for name in ("ok", "party", "witness", "traits")} | changes
    return Observation(fields.pop("where", RAGGED.where), "the weight", "off by 25%", **fields)


def test_a_weight_that_the_processor_unpacks_wrongly_is_excused_for_the_reference() -> None:
    assert "cpu_dequantize_4bit" in settler([spec()])(failed(spec(), RAGGED), ENVIRONMENT).finding


@pytest.mark.parametrize(
    ("case", "environment", "failures"),
    [
        (spec("int8"), ENVIRONMENT, [RAGGED]),
        (spec(), {"device": "cuda:0", "cpu_capability": "AVX512"}, [RAGGED]),
        (spec(), {"device": "cpu", "cpu_capability": "AVX2"}, [RAGGED]),
        (spec(), ENVIRONMENT, [observation(traits={"columns": 128, "dtype": "float32"})]),
        (spec(), ENVIRONMENT, [observation(traits=None)]),
        (spec(), ENVIRONMENT, [RAGGED, observation(where="k_proj", party=Party.IMPLEMENTATION)]),
        (spec(), ENVIRONMENT, [RAGGED, observation(where="k_proj", traits={"columns": 64})]),
        (spec(implementation="peft"), ENVIRONMENT, [RAGGED]),
    ],
    ids=["scheme", "device", "processor", "shape", "no shape", "own", "one of two", "not the reference"],
)
def test_outside_its_condition_it_excuses_nothing(
    case: CaseSpec, environment: dict[str, str], failures: list[Observation]
) -> None:
    assert settler([case])(failed(case, *failures), environment).finding == ""


@pytest.mark.parametrize(("mode", "excused"), [("non-reentrant", True), ("default", True), ("reentrant", False)])
def test_a_mode_of_checkpointing_is_a_condition(mode: str, excused: bool) -> None:
    case = spec("int8,skip=lm_head", checkpointing=mode)
    held = Observation("held", "1", "2", ok=False, party=Party.STACK, witness="a bare layer")
    assert bool(settler([case])(failed(case, held, rule="KB405"), ENVIRONMENT).finding) is excused


@pytest.mark.parametrize(
    ("adapters", "quant", "excused"),
    [
        ("peft:HRA", "int8", True),
        ('{"peft_type": "HRA", "r": 2}', "int8,skip=lm_head", True),
        ("peft:HRA", "nf4", False),
        ("peft:LoRA", "int8", False),
        ("peft:OLoRA", "nf4", True),
        ('{"peft_type": "LORA", "init_lora_weights": "olora"}', "fp4", True),
        ("peft:OLoRA", "int8", False),
        ("reference", "nf4", False),
    ],
)
def test_the_adapters_of_a_case_are_a_condition(adapters: str, quant: str, excused: bool) -> None:
    case = CaseSpec(model="m", quant=quant, implementation="reference", adapters=adapters)
    start = Observation("logits", "near", "far", ok=False, party=Party.STACK, witness="the unprepared base")
    assert bool(settler([case])(failed(case, start, rule="KB803"), ENVIRONMENT).finding) is excused


@pytest.mark.parametrize(("decides", "excused"), [(True, False), (False, True)])
def test_who_is_excused(decides: bool, excused: bool) -> None:
    finding = Finding(
        rule="KB303", party=Party.STACK, reason="why", script="s.py", thread="t#1", decides_model=decides,
        condition=Condition(dtypes=("float32",), where="q_proj"),
    )  # fmt: skip
    case = spec(implementation="somebody:prepare")
    line = settle(failed(case, RAGGED), case, ENVIRONMENT, [finding]).finding
    assert line == ("why (s.py, t#1)" if excused else "")


def test_what_passed_is_left_alone() -> None:
    passed = Result(rule="KB303", case=spec().id, level=Level.MUST, status=Status.PASS)
    assert settler([spec()])(passed, ENVIRONMENT) is passed


def test_every_committed_finding_says_when_it_shows() -> None:
    assert not [f.rule for f in findings() if f.condition == Condition()]


@pytest.mark.parametrize(("where", "excused"), [("prepared model, experts upcast", True), ("prepared model", False)])
def test_experts_are_the_reason_only_where_they_are_upcast(where: str, excused: bool) -> None:
    seen = Observation(where, "less", "more", ok=False, party=Party.MODEL, witness="counted")
    kb902 = [f for f in findings() if f.rule == "KB902"]
    assert any(f.explains("KB902", seen, spec(), ENVIRONMENT) for f in kb902) == excused
