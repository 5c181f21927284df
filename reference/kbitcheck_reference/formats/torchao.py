"""Float64 dequantization of torchao's int8 weights: ``(qdata - zero_point) * scale``, one scale a row or group of columns.

Source: torchao's documentation of ``Int8Tensor`` and of affine quantization.
"""

from typing import Any

import torch
from torch import nn

PACKAGE = "torchao"
STEPS = 127.5  # symmetric codes reach from -128 to 127: half of the 255 steps


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter is such a weight: by the names of its classes."""
    return any(base.__name__ == "Int8Tensor" for base in type(parameter).__mro__)


def holds(module: nn.Module) -> bool:
    """Whether a module owns such a weight."""
    return any(packs(parameter) for parameter in module.parameters(recurse=False))


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes."""
    weight: Any = layer.weight
    zero = 0 if weight.zero_point is None else weight.zero_point.detach()
    return dequantize_int8(weight.qdata.detach(), weight.scale.detach(), zero)


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int = 0) -> torch.Tensor:
    """Dequantize int8 codes ``(out, in)`` to float64; ``scale`` and ``zero`` are ``(out, groups)``."""
    groups = scale.shape[1]
    grouped = codes.double().view(codes.shape[0], groups, -1)
    offset = zero.double().view(*zero.shape, 1) if isinstance(zero, torch.Tensor) else zero
    return ((grouped - offset) * scale.double().unsqueeze(-1)).reshape(codes.shape)


def pack(weight: torch.Tensor, scheme: str) -> dict[str, torch.Tensor]:
    """Quantize a weight by rows: ``qdata`` (int8, ``(out, in)``) and ``scale`` (float32, ``(out, 1)``)."""
    scale = (weight.detach().abs().amax(dim=1, keepdim=True).double() / STEPS).float()
    codes = (weight.double() / scale.double().clamp(min=1e-30)).round().clamp(-128, 127)
    return {"qdata": codes.to(torch.int8), "scale": scale}
