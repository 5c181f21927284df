"""Compositions of the reference pass, in processes of their own; those that die or hang end the others, and none is left."""

from __future__ import annotations

import time
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, select
from kbitcheck.observe.composition import launch
from kbitcheck.observe.composition.case import CompositionCase
from kbitcheck.observe.loaded import loaded_model
from tests.composition import faults

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compositions")]  # they share the process that starts others


def case_of(composition: Any, quant: str = "nf4", mode: Any = "non-reentrant", fault: Any = None) -> CompositionCase:
    spec = CaseSpec(
        model="tiny:llama",
        quant=quant,
        implementation="reference",
        checkpointing=mode,
        adapters="peft",
        composition=composition,
    )
    return CompositionCase(spec, prepare_model_for_kbit_training, loaded_model(spec), fault)


@pytest.mark.parametrize(
    ("composition", "quant", "mode"),
    [
        ("ddp", "nf4", "non-reentrant"),
        ("ddp", "int8", "reentrant"),
        ("fsdp2", "nf4,storage=bf16", "non-reentrant"),
        ("fsdp2", "int8", "reentrant"),
        ("trainer", "nf4", "reentrant"),
        ("accumulate", "int8", "non-reentrant"),
        ("copy", "nf4", "non-reentrant"),
        ("resume", "nf4", "reentrant"),
        ("resume", "int8", "non-reentrant"),
        ("trainer-resume", "nf4", "reentrant"),
        ("compile", "nf4", "non-reentrant"),
    ],
)
def test_the_reference_passes(composition: str, quant: str, mode: str) -> None:
    case = case_of(composition, quant, mode)
    results = [judge(rule, case) for rule in select(about={"composition"})]
    assert [(r.rule, r.reason, r.failures[:2]) for r in results if r.status not in (Status.PASS, Status.SKIP)] == []
    assert any(r.status is Status.PASS for r in results)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (faults.rank_1_dies, "ended with exit code 7; it last printed: the last line of rank 1"),
        (faults.rank_1_hangs, "did not end, in data at"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_both(fault: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SECONDS", 60.0 if fault is faults.rank_1_dies else 25.0)
    start = time.monotonic()
    case = case_of("ddp", fault=fault)
    result = judge(next(rule for rule in select(about={"composition"}) if rule.code == "KB701"), case)
    where = {f.where: f.actual for f in result.failures}
    assert said in where["rank 1"]
    assert where.keys() == {"rank 1"}
    assert time.monotonic() - start < 120
    assert launch._server()._process.pid in {p.pid for p in psutil.Process().children()}
    assert psutil.Process(launch._server()._process.pid).children() == []


def resumed(composition: str, fault: Any) -> Any:
    case = case_of(composition, mode="non-reentrant", fault=fault)
    return judge(next(rule for rule in select(about={"composition"}) if rule.code == "KB708"), case)


@pytest.mark.parametrize("composition", ["resume", "trainer-resume"])
def test_a_run_that_is_killed_between_two_passes_continues_bit_by_bit(composition: str) -> None:
    result = resumed(composition, faults.killed)
    assert (result.status, result.failures) == (Status.PASS, ())


@pytest.mark.parametrize(
    ("composition", "fault", "said"),
    [
        ("resume", faults.killed_without_the_optimizer, "optimizer"),
        ("resume", faults.killed_without_the_scheduler, "scheduler"),
        ("resume", faults.killed_without_random_states, "random state of torch"),
        ("trainer-resume", faults.killed_trainer_without_the_optimizer, "optimizer"),
        ("trainer-resume", faults.killed_trainer_without_random_states, "random state"),
    ],
)
def test_what_a_killed_run_did_not_save_is_named(composition: str, fault: Any, said: str) -> None:
    result = resumed(composition, fault)
    assert result.status is Status.FAIL
    assert said in result.failures[0].actual
