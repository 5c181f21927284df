"""Faults of KB6xx."""

from __future__ import annotations

from typing import Any

import torch

from kbitcheck.sabotage.fault import Prepare, around, breaks, wraps


@wraps("KB601")
def everything_cast_before_anything_is_freed(prepare: Prepare) -> Prepare:
    def cast(model: Any) -> None:
        wide = [p.detach().to(torch.float64) for p in model.parameters() if p.is_floating_point()]
        del wide

    return around(prepare, cast, lambda model, token: None)


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
