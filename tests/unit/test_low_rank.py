"""Twins compute plain LoRA by its definition: the bits of PEFT's code where that is right, and none of its faults."""

from __future__ import annotations

import contextlib
import copy
from itertools import product
from typing import Any

import pytest
import torch

from kbitcheck.observe.twin.low_rank import define
from tests import adapter_types

peft = pytest.importorskip("peft")


def drawn(name: str, scheme: str = "nf4") -> Any:
    model = adapter_types.prepared(name, scheme)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad and not p.any()):
            parameter.normal_(std=0.1)
    return model.train()


def step(model: Any, around: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    with around:
        loss = model(**adapter_types.batch(1)).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


TYPES = ("LoRA", "rsLoRA", "LoRA, dropout", "LoRA, a head trained", "LoRA, experts", "AdaLoRA")


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("scheme", "name"), [*product(("nf4", "int8"), TYPES), ("nf4", "DoRA")])
def test_the_definition_has_pefts_bits(name: str, scheme: str, autocast: bool) -> None:
    if name == "LoRA, experts" and not hasattr(peft.tuners.lora.layer.ParamWrapper, "get_delta_factors"):
        pytest.skip("before PEFT 0.21 the sum is rounded otherwise")
    model = drawn(name, scheme)
    defined = define(copy.deepcopy(model))
    around = [torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext() for _ in range(2)]
    with torch.compiler.set_stance("force_eager"):
        own, by_definition = step(model, around[0]), step(defined, around[1])
    assert [n for n, g in own.items() if g is not None and not torch.equal(g, by_definition[n])] == []
    assert any("forward" in vars(m) for m in defined.modules())
