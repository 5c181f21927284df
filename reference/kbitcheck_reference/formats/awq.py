"""Float64 dequantization of AWQ weights in AutoAWQ's layout for matrix products: 4 bits, a scale and a zero for a group of columns.

Sources: AWQ (arXiv 2306.00978) for the quantizer; the published checkpoints' layout: a word has the codes of eight neighbouring rows of
the weight, the even ones in its lower half.
"""

from typing import Any

import torch
from torch import nn

from ..bit_stream import from_words, to_words

PACKAGE = ""
FIXES_DTYPES = True
"""A layer casts its scales to the dtype of its input, for good, so that nothing around it may be cast."""
BITS = 4
ROWS = 8
"""Rows of the weight whose codes are one word."""
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of the eight rows of a word, by place from the lowest bits on."""
_PARTS = ("qweight", "qzeros", "scales")


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter is packed: none is, as a layer's tensors are buffers."""
    return False


def holds(module: nn.Module) -> bool:
    """Whether a module owns the three tensors of a packed weight, packed along its rows."""
    owner: Any = module
    words, zeros, scales = (getattr(owner, part, None) for part in _PARTS)
    if not all(isinstance(part, torch.Tensor) for part in (words, zeros, scales)):
        return False
    whole = not owner.qweight.is_floating_point()
    return whole and bool(owner.qweight.shape[-1] * ROWS == owner.scales.shape[-1])


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes."""
    owner: Any = layer
    weight: torch.Tensor = dequantize(*(getattr(owner, part).detach() for part in _PARTS))
    return weight


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize the tensors of a checkpoint to float64, ``(out, in)``."""
    columns, groups = qweight.shape[0], scales.shape[0]
    group = torch.arange(columns, device=qweight.device) // (columns // groups)
    return ((_codes(qweight) - _codes(qzeros)[group]).double() * scales.double()[group]).T


def pack(weight: torch.Tensor, scheme: str, group: int | None = 128) -> dict[str, torch.Tensor]:
    """Quantize a weight to the nearest codes: ``qweight``, ``qzeros`` and ``scales`` (float16); ``group`` columns share a scale.

    Raises:
        ValueError: the rows fill no whole number of words, or the columns no whole number of groups.
    """
    rows, columns = weight.shape
    size, most = group or columns, 2**BITS - 1
    if rows % ROWS or columns % size:
        raise ValueError(f"{rows} × {columns} codes fill no whole words of {ROWS} rows and groups of {size} columns")
    grouped = weight.detach().double().T.unflatten(0, (-1, size))  # (groups, columns, rows)
    low, high = grouped.amin(dim=1).clamp(max=0), grouped.amax(dim=1).clamp(min=0)
    scales = torch.where(high > low, (high - low) / most, 1.0).half()
    zeros = (-low / scales.double()).round().clamp(0, most)
    codes = (grouped / scales.double()[:, None] + zeros[:, None]).round().clamp(0, most).flatten(0, 1)
    return {"qweight": _words(codes), "qzeros": _words(zeros), "scales": scales}


def _words(codes: torch.Tensor) -> torch.Tensor:
    return to_words(codes.unflatten(1, (-1, ROWS))[..., list(PLACES)].flatten(1), BITS)


def _codes(words: torch.Tensor) -> torch.Tensor:
    placed = from_words(words, BITS, words.shape[1] * ROWS).unflatten(1, (-1, ROWS))
    codes = torch.empty_like(placed)
    codes[..., list(PLACES)] = placed
    return codes.flatten(1)
