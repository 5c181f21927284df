"""A finding explains a failure only under its condition, and excuses only whom it says."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.finding import Condition, Finding
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.judge import precision
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


INFERENCE = "RuntimeError: Cannot set version_counter for inference tensor (torch/_tensor.py:2)"
SAVED = "NotImplementedError (transformers/core_model_loading.py:151)"


@pytest.mark.parametrize(
    ("rule", "quant", "where", "raised", "excused"),
    [
        ("KB510", "nf4", "save and reload of the base", SAVED, True),
        ("KB510", "nf4", "save and reload of the base", "PermissionError: [Errno 13] (safetensors/torch.py:352)", False),
        ("KB510", "nf4", "save and reload of the base", "NotImplementedError: mine (modeling_mine.py:3)", False),
        ("KB510", "nf4", "save and reload of the base", "", False),
        ("KB510", "fp8", "logits", "", True),
        ("KB510", "fp8", "logits", "RuntimeError: shapes", False),
        ("KB510", "fp8", "save and reload", "RuntimeError: shapes", False),
        ("KB308", "quanto-int4", "5 infer", INFERENCE, True),
        ("KB308", "quanto-int4", "5 infer", "RuntimeError: shapes", False),
        ("KB308", "quanto-int4", "5 infer: quantized weights", "", False),
        ("KB308", "nf4", "as users run it: 1 evaluate", "RuntimeError: shapes (mine.py:1)", False),
    ],
)  # fmt: skip
def test_a_finding_excuses_the_exception_that_it_names_and_no_other(
    rule: str, quant: str, where: str, raised: str, excused: bool
) -> None:
    party = Party.MODEL if rule == "KB308" else Party.STACK
    seen = Observation(where, "no error", raised, ok=False, party=party, witness="the base")
    case = spec(quant, implementation="somebody:prepare")
    failure = dataclasses.replace(seen, traits={"raised": raised} if raised else None)
    assert bool(settler([case])(failed(case, failure, rule=rule), {"device": "cpu"}).finding) is excused


@pytest.mark.parametrize("code", ["KB210", "KB306", "KB308", "KB408", "KB510"])
def test_what_a_rule_says_of_an_exception_has_it_as_a_trait(code: str) -> None:
    """Else a finding without a pattern would excuse it."""
    check = inspect.unwrap(rules()[code].check)
    source = inspect.getsource(check) + inspect.getsource(precision._forward) * (code == "KB210")
    shown = re.findall(r"str\((?:\w+\.)?(?:base_)?raised\b", source)
    assert shown
    assert len(re.findall(r"\.of\(\s*(?:\w+\.)?(?:base_)?raised\s*\)", source)) == len(shown)
