"""KB510 on checkpoints that are quantized already, which transformers 5 can load and train and cannot save again."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import kbitcheck_reference

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import Distance
from kbitcheck.core.result import Observation, Party, Result, Status
from kbitcheck.core.rule import judge, select
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.open_case import open_case
from kbitcheck.observe.store import round_trip
from kbitcheck.run import subject as implementations
from kbitcheck.run.findings import settler
from kbitcheck.run.runner import run

QUANTS = ("nf4,double", "int8")
[KB510] = select(("KB510",))
BASE = "save and reload of the base"


@pytest.fixture(scope="module", params=QUANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("quantized")
    resolve("tiny:llama").load(Quantization.parse(request.param)).save_pretrained(folder)
    return str(folder), request.param


def spec(checkpoint: tuple[str, str], implementation: str = "reference") -> CaseSpec:
    model, quant = checkpoint
    return CaseSpec(model=model, quant=quant, implementation=implementation)


def failures(result: Result) -> dict[str, Observation]:
    return {f.where: f for f in result.failures}


def settled(result: Result, checkpoint: tuple[str, str], implementation: str) -> Result:
    return settler([spec(checkpoint, implementation)])(result, {})


@pytest.mark.transformers5("transformers 4 saves what it loaded")
def test_a_base_that_nobody_can_save_is_the_stacks_and_is_not_counted(checkpoint: tuple[str, str]) -> None:
    result = judge(KB510, open_case(spec(checkpoint), implementations.load("reference")))
    assert set(failures(result)) == {BASE}
    failure = failures(result)[BASE]
    assert failure.party is Party.STACK
    assert failure.actual.startswith("NotImplementedError (transformers/core_model_loading.py:")
    for implementation in ("reference", "peft", "somebody:prepare"):
        assert "transformers#45743" in settled(result, checkpoint, implementation).finding


@pytest.mark.transformers5("transformers 4 saves what it loaded")
@pytest.mark.parametrize("prepare", ["reference", "peft"])
def test_such_a_checkpoint_is_ready(checkpoint: tuple[str, str], prepare: str) -> None:
    if prepare == "peft":
        pytest.importorskip("peft")
    report = run([spec(checkpoint, prepare)], [KB510], in_process=True, blame="any")
    assert report.exit_code == 0
    assert report.results[0].finding


def test_adapters_that_do_not_load_again_count_all_the_same(checkpoint: tuple[str, str]) -> None:
    calls = iter(range(1, 9))

    def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        model = kbitcheck_reference.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing, gradient_checkpointing_kwargs
        )
        with torch.no_grad():
            model.model.norm.weight.mul_(next(calls))
        return model

    result = judge(KB510, open_case(spec(checkpoint), implementations.describe(prepare)))
    assert failures(result)["logits"].party is Party.IMPLEMENTATION
    assert not settled(result, checkpoint, "somebody:prepare").finding


def test_a_preparation_that_cannot_be_saved_counts_where_its_base_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> None:
        raise RuntimeError("not this model")

    def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        model.save_pretrained = refuse
        return model

    case = open_case(CaseSpec(model="tiny:llama", quant="nf4", implementation="x"), implementations.describe(prepare))
    failure = failures(judge(KB510, case))["save and reload"]
    assert failure.party is Party.IMPLEMENTATION
    assert failure.actual.startswith("RuntimeError: not this model (test_saves_and_loads.py:")


def test_a_preparation_that_changes_how_a_class_saves_loses_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        monkeypatch.setattr(type(model.model.norm), "_save_to_state_dict", lambda *_: None)
        return model.requires_grad_(False)

    case = open_case(CaseSpec(model="tiny:llama", quant="nf4", implementation="x"), implementations.describe(prepare))
    assert "model.norm.weight" in case.store.missing


def test_a_base_whose_logits_are_no_number_excuses_nobody() -> None:
    def facts(relative: float) -> Any:
        store = SimpleNamespace(
            missing=(), unexpected=(), base_raised=None, raised=None, logits=Distance(equal=False, relative=relative)
        )
        return SimpleNamespace(store=store, forwards=(), compute_ulp=1e-7, unprepared=None)

    case = facts(0.5)
    for case.unprepared, party in ((facts(math.nan), Party.IMPLEMENTATION), (facts(0.5), Party.STACK)):
        assert [seen.party for seen in KB510.check(case) if not seen.ok] == [party]


def test_a_live_model_has_no_forecast() -> None:
    live = LiveModel.of(resolve("tiny:llama").load(Quantization.parse("nf4")))
    with pytest.raises(Unavailable, match="a live model"):
        Loaded.from_source(live, CaseSpec(model="mine", quant="nf4", implementation="x")).forecast(
            CaseSpec(model="mine", quant="nf4", implementation="x")
        )


def test_an_error_of_a_rule_says_where() -> None:
    def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        raise KeyError("a")

    case = open_case(CaseSpec(model="tiny:llama", quant="nf4", implementation="x"), implementations.describe(prepare))
    result = judge(KB510, case)
    assert result.status is Status.ERROR
    assert "KeyError: 'a' (test_saves_and_loads.py:" in result.reason


@pytest.mark.parametrize("where", ["prepared", "base"])
def test_running_out_of_memory_is_no_property_of_the_model(where: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.error = error

        def save_pretrained(self, folder: str) -> None:
            raise self.error

    full, other = torch.OutOfMemoryError("no memory"), ValueError("not saved")
    models = {"prepared": Model(full if where == "prepared" else other), "base": Model(full)}
    adapter = {"a": torch.nn.Parameter(torch.ones(1))}
    preparation: Any = SimpleNamespace(
        prepared_copy=lambda: models["prepared"], copy=lambda: models["base"], attach=lambda model: (model, adapter),
        autocast=nullcontext, batch={"input_ids": torch.ones(1, 1)}, loaded=SimpleNamespace(state_keys=frozenset()),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kbitcheck.observe.probes.forwards.forward_logits", lambda *_: torch.ones(1))
        with pytest.raises(torch.OutOfMemoryError):
            round_trip(preparation)
