"""Float64 dequantization of compressed-tensors' weights: integers or e4m3 numbers times the scale of their row, group or block.

Source: compressed-tensors' documentation of its formats ``pack-quantized``, ``int-quantized`` and ``float-quantized``. Integers that are
packed are stored without a sign, with half of their range added. Products are rounded to the dtype of the scales. A model's first
forward unpacks every weight for good: a layer that holds the product beside its scales stands for that.
"""

from typing import Any

import torch
from torch import nn

from ..bit_stream import from_words, to_words

PACKAGE = "compressed_tensors"
FIXES_DTYPES = True
"""What a forward unpacks has the scales' dtype, and takes inputs in that alone: nothing around it may be cast."""
LARGEST = 448.0
BITS = {"compressed-tensors-int4": 4, "compressed-tensors-int8": 8}
_STATES = ("compressed", "decompressed")


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds the words of a stream of codes."""
    return parameter.dtype == torch.int32


def holds(module: nn.Module) -> bool:
    """Whether a module owns one matrix in a state of the library that is packed, or that a forward unpacked."""
    owner: Any = module
    scheme, status = getattr(module, "quantization_scheme", None), getattr(module, "quantization_status", "")
    if not isinstance(module, nn.Linear) or getattr(scheme, "weights", None) is None:
        return False
    own = owner._parameters
    stored = own.get("weight_packed") is not None or own.get("weight") is not None
    return stored and own.get("weight_scale") is not None and str(getattr(status, "value", status)) in _STATES


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes."""
    owner: Any = layer
    own = {name: tensor.detach() for name, tensor in owner._parameters.items() if tensor is not None}
    weights, scale = owner.quantization_scheme.weights, own["weight_scale"]
    plain = own.get("weight")
    if plain is not None and plain.dtype not in (torch.int8, torch.float8_e4m3fn):
        numbers: torch.Tensor = plain.double()
        return numbers
    zero = own.get("weight_zero_point")
    if plain is None:
        rows, columns = own["weight_shape"].tolist()
        codes = unpack_codes(own["weight_packed"], weights.num_bits, columns)
        if zero is not None:
            zero = unpack_codes(zero.T, weights.num_bits, rows).T
    else:
        codes = plain.double()
    return dequantize(codes, scale, zero, getattr(weights, "block_structure", None))


def unpack_codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The signed codes ``(rows, columns)`` of packed words ``(rows, ceil(columns * bits / 32))``."""
    codes: torch.Tensor = from_words(words, bits, columns) - 2 ** (bits - 1)
    return codes


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, block: Any = None
) -> torch.Tensor:
    """Dequantize codes ``(out, in)`` to float64, rounded to the dtype of ``scale``.

    ``scale`` is ``(1,)`` for the whole weight, ``(out, 1)`` for rows, ``(out, groups)``, or one number for each ``block`` of rows and
    columns, of which the last ones may be short; ``zero`` has the same shape and is the code that stands for zero.
    """
    shifted = codes.double() - (0 if zero is None else _spread(zero, codes.shape, block).double())
    product: torch.Tensor = shifted * _spread(scale, codes.shape, block).double()
    rounded: torch.Tensor = product.to(scale.dtype).double()
    return rounded


def pack(
    weight: torch.Tensor, scheme: str, group: int | None = None, *, symmetric: bool = True
) -> dict[str, torch.Tensor]:
    """Quantize a weight by ``compressed-tensors-int4`` or ``-int8``, in its own dtype; ``group`` columns share a scale, by default all.

    Symmetric codes reach from one end of their range to half a step below the other, each group's largest magnitude at that; others
    put a group's smallest and largest number, and zero, between their ends.
    """
    bits, own = BITS[scheme], weight.detach()
    grouped = own.unflatten(1, (-1, group or own.shape[1]))
    least, most = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    steps = most - least
    if symmetric:
        scale = grouped.abs().amax(dim=-1) / (steps / 2)
        zero = torch.zeros_like(scale)
    else:
        low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
        scale = (high - low) / steps
        zero = (least - low / scale.clamp(min=torch.finfo(own.dtype).tiny)).round().clamp(least, most)
    scale = scale.clamp(min=torch.finfo(own.dtype).eps)
    codes = (grouped / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(least, most).flatten(1).long()
    packed = {
        "weight_packed": to_words(codes + 2 ** (bits - 1), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(own.shape),
    }
    if not symmetric:
        packed["weight_zero_point"] = to_words(zero.long().T + 2 ** (bits - 1), bits).T.contiguous()
    return packed


def _spread(numbers: torch.Tensor, shape: torch.Size, block: Any) -> torch.Tensor:
    rows, columns = shape
    if numbers.dim() < 2:
        return numbers.reshape(1, 1).expand(rows, columns)
    if block is not None:
        high, wide = block
        row, column = torch.arange(rows) // high, torch.arange(columns) // wide
        return numbers[row.to(numbers.device).unsqueeze(1), column.to(numbers.device)]
    return numbers.repeat_interleave(columns // numbers.shape[1], dim=1)
