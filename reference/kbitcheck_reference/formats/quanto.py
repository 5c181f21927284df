"""Float64 dequantization of optimum-quanto's weights: int8 codes with a scale a row, int4 codes with a scale and a shift a group.

Source: optimum-quanto's documentation of its quantized tensors. An int4 weight's numbers are those of its scales' dtype: the product
``scale * code`` and the difference from the shift are each rounded to it.
"""

from typing import Any

import torch
from torch import nn

PACKAGE = "optimum.quanto"
FIXES_DTYPES = True
"""A layer takes inputs and a bias in its scales' dtype alone, so that nothing around it may be cast."""
BITS = 4
GROUP = 128
_BYTES, _BITS, _TILED = "WeightQBytesTensor", "WeightQBitsTensor", "TinyGemmWeightQBitsTensor"
_LANES = 16  # rows whose codes torch's int4 product on a CPU reads at once


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter is such a weight: by the names of its classes."""
    return any(base.__name__ in (_BYTES, _BITS) for base in type(parameter).__mro__)


def holds(module: nn.Module) -> bool:
    """Whether a module owns a matrix of int8 or int4 codes in a layout that is read here, which those of GPU kernels are not."""
    weight: Any = module._parameters.get("weight")
    if weight is None or type(weight).__name__ not in (_BYTES, _BITS, _TILED) or weight.dim() != 2:
        return False
    return weight.qtype.name in ("qint8", "qint4")


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes."""
    weight: Any = layer.weight
    kind = type(weight).__name__
    if kind == _BYTES:
        return dequantize_int8(weight._data.detach(), weight._scale.detach())
    rows, columns = weight.shape
    size = weight._group_size or columns
    if kind == _BITS:
        codes = unpack_halves(weight._data._data.detach(), rows * columns // size)
        return dequantize_int4(codes, weight._scale.detach(), weight._shift.detach()).view(rows, columns)
    scale, middle = (part.t().reshape(-1, 1) for part in weight._scale_shift.detach().unbind(-1))
    shift = (2.0 ** (BITS - 1) * scale.double() - middle.double()).to(scale.dtype)
    codes = unpack_tiles(weight._data._data.detach(), rows, columns).view(-1, size)
    return dequantize_int4(codes, scale, shift).view(rows, columns)


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantize int8 codes ``(out, in)`` to float64; ``scale`` is ``(out, 1)``, or one number for a single row."""
    return codes.double() * scale.double()


def dequantize_int4(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Dequantize int4 codes ``(groups, size)`` to float64; ``scale`` and ``shift`` are ``(groups, 1)``.

    The shift is a number of the weight's own, or an integer: then it is the code that stands for zero.
    """
    if not shift.is_floating_point():
        return _rounded((codes.double() - shift.double()) * scale.double(), scale.dtype)
    return _rounded(_rounded(codes.double() * scale.double(), scale.dtype) - shift.double(), scale.dtype)


def unpack_halves(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Split bytes ``(rows, size)`` into ``count`` rows of codes: low nibbles are the first half of the rows, high ones the second."""
    return torch.cat([packed & 0xF, packed >> BITS])[:count]


def unpack_tiles(packed: torch.Tensor, rows: int, columns: int, lanes: int | None = None) -> torch.Tensor:
    """The codes ``(rows, columns)`` of the layout for torch's int4 product on a CPU: tiles of rows, column after column.

    A processor with AVX-512 has tiles of 64 rows: byte ``i`` of a column holds rows ``i`` and ``i + 32``. One with AVX2 has tiles of 32:
    rows ``i`` and ``i + 16``. Any other, and rows that fill no tile: neighbouring rows. The first is in the low nibble. ``lanes`` is
    the number of bytes of a tile's column; by default that of this processor, 0 for neighbours.
    """
    if lanes is None:
        lanes = {"AVX512": 2 * _LANES, "AVX2": _LANES}.get(torch.backends.cpu.get_cpu_capability(), 0)
    raw, codes = packed.reshape(-1), torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    tile = 2 * lanes or 2 * _LANES
    for start in range(0, rows, tile):
        high = min(tile, rows - start)
        block = raw[start * columns // 2 : (start + high) * columns // 2].view(columns, high // 2)
        pair = torch.stack([block & 0xF, block >> BITS])  # (nibble, column, byte)
        whole = lanes and high == tile
        codes[start : start + high] = (
            pair.permute(0, 2, 1).flatten(0, 1) if whole else pair.permute(2, 0, 1).flatten(0, 1)
        )
    return codes


def pack(weight: torch.Tensor, scheme: str, group: int | None = None) -> dict[str, torch.Tensor]:
    """Quantize a weight by ``quanto-int8`` or ``quanto-int4``, in its own dtype.

    int8: ``_data`` ``(out, in)`` and ``_scale``, each row's largest magnitude over 127. int4: ``_data`` (bytes of two codes),
    ``_scale``, ``_shift``; each group's smallest number has code 0, its largest code 15. ``group`` columns are one, by default all.
    """
    own = weight.detach()
    if scheme == "quanto-int8":
        scale = own.abs().amax(dim=1, keepdim=True) / 127
        return {"_data": (own / scale).round().clamp(-128, 127).to(torch.int8), "_scale": scale}
    flat = own.reshape(-1, group or own.shape[1])
    low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    scale = (high - low) / (2**BITS - 1)
    codes = ((flat - low) / scale).round().clamp(0, 2**BITS - 1).to(torch.uint8)
    half = -(-codes.shape[0] // 2)
    packed = codes[:half].clone()
    packed[: codes.shape[0] - half] |= codes[half:] << BITS
    return {"_data": packed, "_scale": scale, "_shift": -low}


def _rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return numbers.to(dtype).double()
