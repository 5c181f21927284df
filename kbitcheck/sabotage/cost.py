"""Faults of KB6xx."""

from typing import Any

import torch

from kbitcheck.sabotage.fault import Prepare, breaks, casts, spoils, wraps
from kbitcheck.sabotage.helpers import before_enabling, half


@wraps("KB601")
def everything_cast_before_anything_is_freed(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    wide = [p.detach().to(torch.float64) for p in model.parameters() if p.is_floating_point()]
    del wide
    return prepare(model, *arguments)


@spoils("KB601")
def a_model_that_allocates_when_switched_on(model: Any) -> None:
    before_enabling(model, lambda self, kwargs: torch.zeros(1 << 20))


@wraps("KB602", accelerator=True)
def a_large_block_left_in_the_cache(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    prepare(model, *arguments)
    block = torch.empty(64 << 20, dtype=torch.uint8, device=next(model.parameters()).device)
    del block
    return model


@breaks("KB603")
def positions_widened_to_float64(model: Any) -> None:
    model.transformer.wpe.double()


@casts("KB603")
def keeps_weights_in_larger_storages(model: Any) -> None:
    for _, parameter in half(model):
        room = torch.zeros(2 * parameter.numel(), dtype=torch.float32)
        room[: parameter.numel()] = parameter.data.float().flatten()
        parameter.data = room[: parameter.numel()].view(parameter.shape)
