"""Random up-projections: at zero, down-projections would have no gradient by construction."""

from __future__ import annotations

import torch
from kbitcheck_reference import lora
from torch import nn


def draw_up(model: nn.Module, seed: int, scale: float = 0.02) -> None:
    """Draw every ``lora_B`` non-zero, in place: the same float32 numbers for a layer of the same name, whatever its dtype."""
    for name, layer in lora.layers(model).items():
        generator = torch.Generator().manual_seed(lora._seed_of(seed, f"{name}.lora_B"))
        weight = layer.lora_B.weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
