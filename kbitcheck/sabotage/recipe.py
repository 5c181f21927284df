"""Faults of KB215."""

from __future__ import annotations

from typing import Any

from kbitcheck.sabotage.fault import breaks, implements
from kbitcheck.sabotage.helpers import (
    freeze,
    half,
    switch_on,
)


@breaks("KB215", profile="frozen-half")
def one_norm_of_a_tower_in_half(model: Any) -> None:
    norm = model.transformer.h[1].ln_2
    norm.weight.data = norm.weight.data.bfloat16()
    norm.bias.data = norm.bias.data.bfloat16()


@implements("KB215", model="tiny:llama", profile="frozen-half")
def casts_norms_of_attention_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for name, parameter in half(model):
        if "input_layernorm" in name:
            parameter.data = parameter.data.float()
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
