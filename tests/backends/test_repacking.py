"""What bitsandbytes does to 4-bit weights in an evaluation on AVX512-BF16 processors, on a processor that need not have them."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from kbitcheck_reference.formats.bitsandbytes import unpack

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.models.sources.recipe import Recipe
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.reference import prepare_model_for_kbit_training
from kbitcheck.run.findings import settler
from kbitcheck.run.subject import load
from tests.shallow import shallow

modules: Any = bitsandbytes.nn.modules


@pytest.fixture
def avx512bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with the instructions: the library's own repacking, and its kernel's product by the reference's format."""

    def gemv(a: torch.Tensor, b: torch.Tensor, out: Any = None, state: Any = None) -> torch.Tensor:
        layer: Any = SimpleNamespace(weight=SimpleNamespace(data=b.detach(), quant_state=state))
        weight = unpack(layer)
        with torch.no_grad():
            product: torch.Tensor = a.bfloat16() @ weight.bfloat16().T
            return product.to(a.dtype)

    if not modules.has_avx512bf16():
        monkeypatch.setattr(bitsandbytes.functional, "gemv_4bit", gemv)
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)


def evened() -> Recipe:
    """A model whose every weight has a shape that the library repacks."""
    source = shallow("tiny:llama")
    return replace(
        source, config={**source.config, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    )


def judged(quant: str, implementation: str, prepare: Any = None) -> Any:
    """KB308's result, as a run settles it, with what is seen as users run it."""
    spec = CaseSpec(model="tiny:llama", quant=quant, implementation=implementation, checkpointing="reentrant")
    case = Case(spec, prepare or load(implementation).function, Loaded.from_source(evened(), spec))
    return settler([spec])(judge(rules()["KB308"], case), {"device": "cpu", "cpu_capability": "AVX2"})


@pytest.mark.usefixtures("avx512bf16")
@pytest.mark.parametrize("quant", ["nf4", "fp4,double"])
def test_an_evaluation_that_repacks_weights_keeps_a_model_from_training(quant: str) -> None:
    result = judged(quant, "peft")
    assert (result.status, result.attributed_to, result.finding) == (Status.FAIL, Party.STACK, "")
    assert {failure.where.partition(": ")[0] for failure in result.failures} == {"as users run it"}
    where = [failure.where for failure in result.failures]
    assert {"as users run it: 1 evaluate: quantized weights", "as users run it: 4 train: quantized weights"} <= {*where}
    assert any(re.match(r"as users run it: [24] train: .*lora_", place) for place in where)
    assert "support_avx512bf16_for_cpu = False" in " ".join(result.notes)


@pytest.mark.usefixtures("avx512bf16")
def test_the_reference_is_excused() -> None:
    assert "cpu_eval_repacks" in judged("nf4", "reference").finding


@pytest.mark.usefixtures("avx512bf16")
def test_who_goes_the_way_round_trains() -> None:
    def prepare(model: Any, **arguments: Any) -> Any:
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return prepare_model_for_kbit_training(model, **arguments)

    assert judged("nf4", "somebody:prepare", prepare).status is Status.PASS


@pytest.mark.usefixtures("avx512bf16")
def test_int8_is_not_repacked() -> None:
    assert judged("int8", "reference").notes == ()
