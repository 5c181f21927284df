"""Faults of adapters of many types on every scheme: ``assert_prepared`` and ``watch`` name each by a rule of its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kbitcheck
from kbitcheck.core.report import Report
from kbitcheck.core.result import Party, Status
from kbitcheck.models.load import quiet
from tests import adapter_types

pytestmark = pytest.mark.slow

BLOCK = "base_model.model.model.layers.{}."
STEPS = 3
# Parts of the names of what each type trains.
PARTS = {
    "LoRA": ("lora_A", "lora_B"),
    "DoRA": ("lora_B", "magnitude"),
    "AdaLoRA": ("lora_A", "lora_B", "lora_E"),
    "IA3": ("ia3_l",),
    "VeRA": ("lambda_b", "lambda_d"),
    "OFT": ("oft_R",),
    "MiSS": ("miss",),
}


def layers(model: Any) -> list[Any]:
    """A layer that each type adapts, in each block: a watched step looks at one block."""
    return [model.get_submodule(BLOCK.format(number) + "self_attn.q_proj") for number in range(2)]


def held(layer: Any, part: str) -> tuple[dict[str, Any], str]:
    """Where a layer holds the tensor of its adapter of which ``part`` is a part of the name."""
    named = (name for name, _ in layer.named_parameters() if part in name and "base_layer" not in name)
    owner, _, last = next(named).rpartition(".")
    return layer.get_submodule(owner)._parameters, last


def each(damage: Callable[[dict[str, Any], str], object]) -> Callable[[Any, str], None]:
    def damaged(model: Any, part: str) -> None:
        for layer in layers(model):
            damage(*held(layer, part))

    return damaged


def with_forward(layer: Any, forward: Callable[..., Any]) -> None:
    """Code of the layer's own: a twin that runs its class's runs it, too."""
    layer.__class__ = type(type(layer).__name__, (type(layer),), {"forward": forward, "__module__": "peft.tuners"})


def not_finite(parameters: dict[str, Any], last: str) -> None:
    parameters[last].data.view(-1)[0] = float("nan")


def shared(model: Any, part: str) -> None:
    (first, last), (others, name) = (held(layer, part) for layer in layers(model))
    others[name] = first[last]


def detached(model: Any, part: str) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters, last = held(self, part)
        own = parameters[last]
        parameters[last] = own.detach()
        try:
            return super(type(self), self).forward(*args, **kwargs)
        finally:
            parameters[last] = own

    for layer in layers(model):
        with_forward(layer, forward)


def times(factor: float) -> Callable[[Any, str], None]:
    """What the adapters add to the layers' output, times a number."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer(x, *args, **kwargs)
        return base + factor * (super(type(self), self).forward(x, *args, **kwargs) - base)

    def damaged(model: Any, part: str) -> None:
        for layer in layers(model):
            with_forward(layer, forward)

    return damaged


def an_experts_part_dropped(model: Any, part: str) -> None:
    """By PEFT's own code, in the graph and of the right shape."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = self.lora_A["default"]._parameters
        own = parameters["weight"]
        kept = torch.ones(self.num_experts, own.shape[0] // self.num_experts, 1)
        kept[1] = 0
        parameters["weight"] = own * kept.reshape(-1, 1)
        try:
            return super(type(self), self).forward(*args, **kwargs)
        finally:
            parameters["weight"] = own

    for module in model.modules():
        if hasattr(module, "parameter_name"):
            with_forward(module, forward)


# Each fault with the rules that may name it, before a run and in one.
FAULTS: dict[Any, tuple[set[str], set[str]]] = {
    each(lambda parameters, last: parameters[last].requires_grad_(False)): ({"KB102"}, {"KB710"}),
    each(lambda parameters, last: parameters[last].register_hook(lambda g: 0.5 * g)): ({"KB304"}, {"KB304"}),
    each(not_finite): ({"KB302", "KB304"}, {"KB713"}),
    shared: ({"KB102"}, {"KB102"}),
    detached: ({"KB302"}, {"KB302", "KB715"}),
    times(0.0): ({"KB302"}, {"KB302", "KB715"}),
}
NAMES = ("frozen", "half a gradient", "not a number", "shared", "detached", "without effect")
# What twins of PEFT's plain layers alone do not have, as they are computed by definition.
BY_DEFINITION = {
    "doubled": ("LoRA", times(2.0)),
    "an expert's part dropped": ("LoRA, experts", an_experts_part_dropped),
}


def cases() -> Iterator[Any]:
    for type_, parts in PARTS.items():
        for name, (fault, (before, during)) in zip(NAMES, FAULTS.items(), strict=True):
            for part in parts[:1] if name == "without effect" else parts:
                yield pytest.param(type_, part, fault, before, during, id=f"{type_}, {part}: {name}")
    for name, (type_, fault) in BY_DEFINITION.items():
        yield pytest.param(type_, "", fault, {"KB304"}, {"KB304"}, id=f"{type_}: {name}")


def before_a_run(model: Any) -> Report:
    try:
        return kbitcheck.assert_prepared(model, select=["KB102", "KB302", "KB304"])
    except kbitcheck.NonConformance as error:
        return error.report


@pytest.mark.parametrize("scheme", adapter_types.SCHEMES)
@pytest.mark.parametrize(("type_", "part", "fault", "before", "during"), [*cases()])
def test_each_door_names_it(
    type_: str, part: str, fault: Callable[[Any, str], None], before: set[str], during: set[str], scheme: str
) -> None:
    adapter_types.needs(scheme)
    model = adapter_types.prepared(type_, scheme)
    if refusal := adapter_types.refusal(model):
        pytest.skip(f"peft does not run these adapters on this model: {refusal}")
    fault(model, part)
    with torch.compiler.set_stance("force_eager"), quiet():
        reports = before_a_run(model), adapter_types.watched(model, STEPS)
    named = [{r.rule for r in report if r.status in (Status.FAIL, Status.ERROR)} for report in reports]
    assert named[0] & before
    assert named[1] & during


def half(model: Any) -> None:
    for layer in layers(model):
        magnitude: nn.Parameter = layer.lora_magnitude_vector["default"].weight
        magnitude.data = magnitude.data.half()


def test_a_magnitude_in_half_precision_is_named() -> None:
    model = adapter_types.prepared("DoRA", "nf4")
    half(model)
    with torch.compiler.set_stance("force_eager"), pytest.raises(kbitcheck.NonConformance, match="KB211"):
        kbitcheck.assert_prepared(model, select=["KB211"])


DRAWN = {
    "LoRA": 'peft:{"peft_type": "LORA", "init_lora_weights": false}',
    # Between a half base's layers these do not run: the witness is the base in float32.
    "IA3": 'peft:{"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": [], "init_ia3_weights": false}',
}


@pytest.mark.parametrize("scheme", adapter_types.SCHEMES)
@pytest.mark.parametrize("type_", DRAWN)
def test_a_start_that_changes_the_function_of_the_base_is_named(type_: str, scheme: str) -> None:
    """Of adapters that are put on: of those that are there nobody can tell a start from training."""
    adapter_types.needs(scheme)
    (result,) = kbitcheck.check_implementation(
        adapter_types.peft.prepare_model_for_kbit_training, models=["tiny:llama"], quants=[scheme], checkpointing=["reentrant"],
        adapters=DRAWN[type_], select=["KB803"],
    )  # fmt: skip
    assert result.status is Status.FAIL
    assert {failure.party for failure in result.failures} == {Party.STACK}
