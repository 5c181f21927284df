"""Float64 dequantization of 4-bit and int8 weights in plain tensor arithmetic, independent of bitsandbytes' kernels.

Sources: QLoRA (arXiv 2305.14314), section 3 and appendix E, for NF4, blocks and double quantization; LLM.int8()
(arXiv 2208.07339) for row-wise absmax; bitsandbytes' published code values for FP4.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

# Each value is the float32 number that the kernels use, held exactly in float64.
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float32,
).double()  # fmt: skip
"""The 16 values of 4-bit NormalFloat by code, float64 of shape ``(16,)`` (QLoRA, appendix E)."""

FP4 = (torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=torch.float32) / 12).double()
FP4 = torch.cat([FP4, -FP4])
"""The 16 values of bitsandbytes' 4-bit float by code (sign, two exponent bits, one mantissa bit), as ``NF4``."""

PACKAGE = "bitsandbytes"
PARAMETERS = frozenset({"Params4bit", "Int8Params"})
STATE_ATTRIBUTES = ("quant_state", "SCB", "CB")
TABLES = {"nf4": NF4, "fp4": FP4}
INT8_STEPS = 127.0
_CPU_ROWS = 32  # rows that bitsandbytes interleaves in the layout of its AVX-512 kernel


def raw_bytes(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The bytes of packed storage that hold ``count`` codes of 4 bits: uint8, flat. Fewer raise a ``ValueError``."""
    raw = packed.detach().contiguous().reshape(-1).view(torch.uint8)
    if 2 * raw.numel() < count:
        raise ValueError(f"{raw.numel()} bytes hold {2 * raw.numel()} codes of 4 bits, fewer than the {count} wanted")
    return raw[: -(-count // 2)]


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Split packed storage of any shape and dtype into ``count`` 4-bit codes, int32: the high nibble of each byte first."""
    raw = raw_bytes(packed, count)
    return torch.stack([raw >> 4, raw & 0xF], dim=1).reshape(-1)[:count].int()


def scale_blocks(values: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Multiply, in place, each block of ``blocksize`` consecutive values by its scale; the last block may be short.

    ``values`` are float64, flat and contiguous, and returned; ``absmax`` has one scale a block, in any shape.
    """
    blocks = -(-values.numel() // blocksize)
    if absmax.numel() < blocks:
        raise ValueError(f"{values.numel()} values in blocks of {blocksize} need {blocks} scales, got {absmax.numel()}")
    scales = absmax.detach().reshape(-1)[:blocks].double()
    whole = values.numel() // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(scales[: whole // blocksize].unsqueeze(1))
    values[whole:].mul_(scales[whole // blocksize :])
    return values


def dequantize_blockwise4(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int, shape: Sequence[int]
) -> torch.Tensor:
    """Dequantize 4-bit weights to float64: ``table[code] * absmax[block]``.

    ``absmax`` is free of double quantization; blocks are counted along the flattened weight, whose number of elements
    may be odd or no multiple of ``blocksize``. Too few codes or scales for ``shape`` raise a ``ValueError``.
    """
    codes = unpack_nibbles(packed, prod(shape))
    values = table.to(packed.device, torch.float64)[codes.long()]
    return scale_blocks(values, absmax, blocksize).view(tuple(shape))


def dequantize_absmax(
    absmax: torch.Tensor, code: torch.Tensor, nested_absmax: torch.Tensor, nested_blocksize: int, offset: torch.Tensor
) -> torch.Tensor:
    """Undo double quantization: ``code[absmax] * nested_absmax[block] + offset``, float64, flat (QLoRA, section 3).

    ``code`` has the 256 values of the uint8 scales; ``offset`` is the mean that was taken off before quantizing.
    """
    values = code.double()[absmax.reshape(-1).long()]
    return scale_blocks(values, nested_absmax, nested_blocksize) + offset.double()


def dequantize_int8(CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:  # noqa: N803  (bitsandbytes' names)
    """Dequantize int8 weights to float64, by the largest magnitude of each row: ``CB * SCB / 127``."""
    if SCB.numel() != CB.shape[0]:
        raise ValueError(f"{CB.shape[0]} rows need as many scales, got {SCB.numel()}")
    return CB.detach().double() * (SCB.detach().double().reshape(-1, 1) / INT8_STEPS)


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a packed weight: by the names of its classes, or by the state that it carries."""
    if any(base.__name__ in PARAMETERS for base in type(parameter).__mro__):
        return True
    return any(getattr(parameter, name, None) is not None for name in STATE_ATTRIBUTES)


def holds(module: nn.Module) -> bool:
    """Whether a module owns a packed weight with its state; weights that are not packed yet are not quantized."""
    if read_state(module) is not None:
        return True
    for parameter in module.parameters(recurse=False):
        if packs(parameter):
            states = (getattr(owner, "quant_state", None) for owner in (parameter, module))
            if parameter.dtype == torch.int8 or any(state is not None for state in states):
                return True
    return False


def read_state(module: Any) -> Any:
    """The state of a parametrized parameter (torch's ``ParametrizationList``), whose owner reads it unpacked; else None."""
    if not isinstance(module, ParametrizationList):
        return None
    return next((each.quant_state for each in module if hasattr(each, "quant_state")), None)


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)`` or as its owner reads it; nothing of the layer changes.

    Works for whatever storage dtype packs the weight, whether or not its scales are quantized again, before and after a
    forward has moved int8 state about, and in the layout that bitsandbytes repacks to for AVX-512 in an eval forward on
    a CPU.
    """
    own = read_state(layer)
    weight: Any = layer.weight if own is None else layer.original
    state = own or getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        return dequantize_int8(weight.data, _int8_scales(layer))
    table = TABLES[state.quant_type]
    if getattr(state, "packing_format_for_cpu", False):
        return _dequantize_cpu_layout(weight.data, state.absmax, table, state.blocksize, state.shape)
    return dequantize_blockwise4(weight.data, absmax(state), table, state.blocksize, state.shape)


def absmax(state: Any) -> torch.Tensor:
    """The scales of a 4-bit state, free of double quantization."""
    if not state.nested:
        scales: torch.Tensor = state.absmax
        return scales
    nested = state.state2
    return dequantize_absmax(state.absmax, nested.code, nested.absmax, nested.blocksize, state.offset)


def pack(weight: torch.Tensor, scheme: str, blocksize: int = 64) -> dict[str, torch.Tensor]:
    """Quantize a weight by ``nf4``, ``fp4`` or ``int8``: each value to the nearest code of its block, or row for int8.

    ``packed`` (uint8, two codes a byte, the first in the high nibble) and ``absmax`` (float32, one a block) for 4 bits;
    ``CB`` (int8, ``(out, in)``) and ``SCB`` (float32, ``(out,)``) for int8.
    """
    if scheme == "int8":
        rows = weight.abs().amax(dim=1).float()
        codes = (weight.double() * INT8_STEPS / rows.double().clamp(min=1e-30).unsqueeze(1)).round()
        return {"CB": codes.to(torch.int8), "SCB": rows}
    table = TABLES[scheme]
    flat = weight.detach().reshape(-1).double()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * blocksize))).view(-1, blocksize)
    scales = padded.abs().amax(dim=1).float()
    relative = padded / scales.double().clamp(min=1e-30).unsqueeze(1)
    codes = (relative.unsqueeze(-1) - table).abs().argmin(dim=-1).reshape(-1, 2).to(torch.uint8)
    count, blocks = -(-flat.numel() // 2), -(-flat.numel() // blocksize)
    return {"packed": (codes[:, 0] << 4 | codes[:, 1])[:count], "absmax": scales[:blocks]}


def _int8_scales(layer: Any) -> torch.Tensor:
    """The scales: the weight's until the first forward hands them to the layer's state."""
    owners = (layer.weight, getattr(layer, "state", None))
    return next(s for s in (getattr(owner, "SCB", None) for owner in owners) if isinstance(s, torch.Tensor))


def _dequantize_cpu_layout(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int, shape: Sequence[int]
) -> torch.Tensor:
    """Dequantize bitsandbytes' AVX-512 layout: 32 rows interleaved by column, low nibbles first, scales transposed."""
    rows, columns = shape
    raw = packed.contiguous().view(torch.uint8).reshape(-1, _CPU_ROWS)
    codes = torch.cat([raw & 0xF, raw >> 4], dim=1).long()
    codes = codes.reshape(rows // _CPU_ROWS, columns // 2, _CPU_ROWS, 2).transpose(1, 2).reshape(-1)
    return scale_blocks(table.to(packed.device)[codes], absmax.T, blocksize).reshape(rows, columns)
