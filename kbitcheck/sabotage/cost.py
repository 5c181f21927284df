"""Faults of KB6xx."""

from __future__ import annotations

from typing import Any

import torch

from kbitcheck.sabotage.fault import Prepare, around, breaks, implements, spoils, wraps
from kbitcheck.sabotage.helpers import (
    doing_first,
    freeze,
    half,
    subclass,
    switch_on,
)


@wraps("KB601")
def everything_cast_before_anything_is_freed(prepare: Prepare) -> Prepare:
    def cast(model: Any) -> None:
        wide = [p.detach().to(torch.float64) for p in model.parameters() if p.is_floating_point()]
        del wide

    return around(prepare, cast, lambda model, token: None)


@spoils("KB601")
def a_model_that_allocates_when_switched_on(model: Any) -> None:
    subclass(model, **doing_first(lambda self, kwargs: torch.zeros(1 << 20)))


@wraps("KB602", accelerator=True)
def a_large_block_left_in_the_cache(prepare: Prepare) -> Prepare:
    def allocate(model: Any, _: Any) -> None:
        block = torch.empty(64 << 20, dtype=torch.uint8, device=next(model.parameters()).device)
        del block

    return around(prepare, lambda model: None, allocate)


@breaks("KB603")
def positions_widened_to_float64(model: Any) -> None:
    weight = model.transformer.wpe.weight
    weight.data = weight.data.double()


@implements("KB603")
def keeps_weights_in_larger_storages(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for _, parameter in half(model):
        room = torch.zeros(2 * parameter.numel(), dtype=torch.float32)
        room[: parameter.numel()] = parameter.data.float().flatten()
        parameter.data = room[: parameter.numel()].view(parameter.shape)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
