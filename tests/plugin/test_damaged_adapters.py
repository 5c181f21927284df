"""``assert_prepared`` on adapters of several types, each damaged in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kbitcheck
from kbitcheck.core.result import Status
from tests.watch import runs

peft = pytest.importorskip("peft")

LAST = "base_model.model.model.layers.1."
TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
DORA = peft.LoraConfig(r=4, use_dora=True, **TARGETS)
BIASES = peft.LoraConfig(r=4, bias="lora_only", **TARGETS)
VERA = peft.VeraConfig(r=4, **{**TARGETS, "target_modules": ["q_proj"]})
IA3 = peft.IA3Config(feedforward_modules=[], **TARGETS)
FOURIER = peft.FourierFTConfig(n_frequency=64, **TARGETS)


class Detached:
    """A layer's forward that takes one tensor of its adapter out of the graph."""

    def __init__(self, cls: Any, name: str) -> None:
        self.cls, self.name = cls, name

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        owner, _, last = self.name.rpartition(".")
        holder: Any = layer.get_submodule(owner)
        parameter = holder._parameters[last]
        holder._parameters[last] = parameter.detach()
        try:
            return self.cls.forward(layer, *args, **kwargs)
        finally:
            holder._parameters[last] = parameter


def detached(name: str) -> Callable[[Any], None]:
    def damage(model: Any) -> None:
        layer = model.get_submodule(LAST + "self_attn.q_proj")
        forward = Detached(type(layer), name)
        own = {"forward": lambda self, *args, **kwargs: forward(self, *args, **kwargs), "__module__": "peft"}
        layer.__class__ = type(type(layer).__name__, (type(layer),), own)

    return damage


def shared(name: str) -> Callable[[Any], None]:
    def damage(model: Any) -> None:
        owner, _, last = name.rpartition(".")
        first, other = (model.get_submodule(f"{LAST}self_attn.{each}.{owner}") for each in ("k_proj", "v_proj"))
        setattr(other, last, getattr(first, last))

    return damage


def one_bias_frozen(model: Any) -> None:
    model.get_submodule(LAST + "self_attn.q_proj").base_layer.bias.requires_grad_(False)


def broken(adapters: Any, damage: Callable[[Any], None] | None, *codes: str) -> set[str]:
    model = runs.prepared(adapters=adapters, attention_bias=True)
    if damage is not None:
        damage(model)
    with torch.compiler.set_stance("force_eager"):
        try:
            report = kbitcheck.assert_prepared(model, select=codes)
        except kbitcheck.NonConformance as error:
            report = error.report
    assert {r.status for r in report} <= {Status.PASS, Status.FAIL}, str(report)
    return {r.rule for r in report if r.status is Status.FAIL}


@pytest.mark.parametrize(
    ("adapters", "damage"),
    [
        (BIASES, one_bias_frozen),
        (BIASES, shared("base_layer.bias")),
        (DORA, shared("lora_B.default.weight")),
        (DORA, shared("lora_magnitude_vector.default.weight")),
        (IA3, shared("ia3_l.default")),
    ],
)
def test_what_adapters_share_or_do_not_train_is_named(adapters: Any, damage: Callable[[Any], None]) -> None:
    assert broken(adapters, damage, "KB102") == {"KB102"}


@pytest.mark.parametrize("adapters", [BIASES, DORA, VERA, IA3], ids=["LoRA with biases", "DoRA", "VeRA", "IA3"])
def test_sound_adapters_share_nothing(adapters: Any) -> None:
    assert broken(adapters, None, "KB102") == set()


@pytest.mark.parametrize(
    ("adapters", "name"),
    [
        (DORA, "lora_magnitude_vector.default.weight"),
        (VERA, "vera_lambda_d.default"),
        (IA3, "ia3_l.default"),
        (FOURIER, "fourierft_spectrum.default"),
    ],
)
def test_a_tensor_that_its_own_layer_detaches_is_named(adapters: Any, name: str) -> None:
    """The float64 twin has the layer's code, and detaches it, too."""
    assert broken(adapters, detached(name), "KB302") == {"KB302"}
