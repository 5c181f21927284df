"""Float64 dequantization of HQQ weights: codes of 1, 2, 3, 4 or 8 bits, a scale and a zero for a group of numbers.

Sources: Half-Quadratic Quantization (Badri and Shaji, 2023) for the quantizer; the published layout: a weight is cut into groups of
neighbouring numbers, in rows (axis 1) or columns (axis 0) of a matrix of groups, and that matrix is cut into slices of rows, of which
the first has the highest bits of each byte. A code of 3 bits is one of ten in a word of 32. Numbers are those of the layer's dtype:
the difference from the zero and the product with the scale are each rounded to it.
"""

from typing import Any

import torch
from torch import nn

PACKAGE = ""
FIXES_DTYPES = True
"""A layer takes inputs in the dtype of its products alone, so that nothing around it may be cast."""
BITS = {f"hqq-int{bits}": bits for bits in (1, 2, 3, 4, 8)}
SLICES = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}
"""How many codes a byte, or of 3 bits a word, has."""
SMALLEST, STEEPEST = 1e-4, 2e4
"""Groups whose numbers are nearer than the first have steps of 1; no scale is the inverse of more than the second."""


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds bytes or words of codes: the layers' weights are of no class of their own."""
    return parameter.dtype in (torch.uint8, torch.int32)


def holds(module: nn.Module) -> bool:
    """Whether a module owns packed codes with the state of one weight, neither scale nor zero quantized again."""
    owner: Any = module
    words = owner._parameters.get("W_q")
    if all(base.__name__ != "HQQLinear" for base in type(module).__mro__) or words is None:
        return False
    state: Any = owner.meta or {}
    stored = packs(words) or bool(state.get("view_as_float"))
    return stored and all(isinstance(state.get(part), torch.Tensor) for part in ("scale", "zero"))


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes."""
    owner: Any = layer
    state, packed = owner.meta, owner.W_q.detach()
    bits, (rows, columns) = int(state["nbits"]), state["shape"]
    packed = packed.view(torch.int32 if bits == 3 else torch.uint8)  # it may be stored under a floating dtype's name
    size = state["group_size"] or (columns if state["axis"] else rows)
    codes = unpack_slices(packed, bits)[: rows * columns // size if state["axis"] else size]
    return dequantize(codes, state["scale"].detach(), state["zero"].detach()).view(rows, columns)


def unpack_slices(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of packed bytes or words, int64: the slices one below the other."""
    slices = SLICES[bits]
    codes = [(packed.long() >> bits * (slices - 1 - place)) & (2**bits - 1) for place in range(slices)]
    return torch.cat(codes)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Dequantize a matrix of groups to float64; ``scale`` and ``zero`` have one number for each row, or for each column."""
    difference = _rounded(codes.double() - zero.double(), scale.dtype)
    return _rounded(difference * scale.double(), scale.dtype)


def pack(
    weight: torch.Tensor, scheme: str, group: int | None = 64, *, axis: int = 1, whole_zeros: bool | None = None
) -> dict[str, torch.Tensor]:
    """Quantize a weight to the nearest codes between each group's ends: ``W_q``, ``scale`` and ``zero``, in the weight's dtype.

    ``group`` numbers are one, with None a row (of axis 0 a column). ``whole_zeros`` rounds zeros, by default those of 4 bits. The method's
    own optimisation of zeros is left out.

    Raises:
        ValueError: the groups fill no whole number of slices.
    """
    bits, (rows, columns) = BITS[scheme], weight.shape
    size = group or (columns if axis else rows)
    if rows * columns % size:
        raise ValueError(f"{rows} × {columns} numbers make no whole groups of {size}")
    grouped = weight.detach().float().reshape((-1, size) if axis else (size, -1))
    if len(grouped) % SLICES[bits] and bits != 3:
        raise ValueError(f"{len(grouped)} rows of codes make no {SLICES[bits]} equal slices")
    low, high = grouped.amin(dim=axis, keepdim=True), grouped.amax(dim=axis, keepdim=True)
    steep = torch.where(high - low > SMALLEST, (2**bits - 1) / (high - low), 1.0).clamp(max=STEEPEST)
    zero = -low * steep
    if bits == 4 if whole_zeros is None else whole_zeros:
        zero = zero.round()
    codes = (grouped * steep + zero).round().clamp(0, 2**bits - 1).long()
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % SLICES[bits]))
    parts = codes.chunk(SLICES[bits])
    words = sum(part << bits * (SLICES[bits] - 1 - place) for place, part in enumerate(parts))
    return {
        "W_q": torch.as_tensor(words).to(torch.int32 if bits == 3 else torch.uint8),
        "scale": (1 / steep).to(weight.dtype),
        "zero": zero.to(weight.dtype),
    }


def _rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return numbers.to(dtype).double()
