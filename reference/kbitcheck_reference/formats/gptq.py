"""Float64 dequantization of GPTQ weights as AutoGPTQ and GPTQModel save them: codes of 2, 3, 4 or 8 bits, a scale and a zero a group.

Sources: GPTQ (arXiv 2210.17323) for the quantizer; the published checkpoints' layout: ``qweight`` packs the codes along the columns of the
weight, ``qzeros`` the zeros along its rows, each less one in the first version of the format; ``g_idx`` has the group of each column.
"""

from typing import Any

import torch
from torch import nn

from ..bit_stream import WORD, from_words, to_words

PACKAGE = ""
BITS = {f"gptq-int{bits}": bits for bits in (2, 3, 4, 8)}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter is packed: none is, as a layer's tensors are buffers."""
    return False


def holds(module: nn.Module) -> bool:
    """Whether a module owns the four tensors of a packed weight."""
    return all(isinstance(getattr(module, part, None), torch.Tensor) for part in _PARTS)


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes.

    A layer that knows the version of its zeros says so by ``qzero_format``; any other has the first.
    """
    owner: Any = layer
    version = owner.qzero_format() if hasattr(owner, "qzero_format") else 1
    weight: torch.Tensor = dequantize(*(getattr(owner, part).detach() for part in _PARTS), version=version)
    return weight


def dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, *, version: int = 1
) -> torch.Tensor:
    """Dequantize the tensors of a checkpoint to float64, ``(out, in)``; their shapes say how many bits a code has."""
    columns, rows = g_idx.shape[0], scales.shape[1]
    bits = qweight.shape[0] * WORD // columns
    codes = from_words(qweight.T, bits, columns)
    zeros = (from_words(qzeros, bits, rows) + (2 - version)) % 2**bits
    group = g_idx.long()
    weight: torch.Tensor = (codes - zeros[group].T).double() * scales.double()[group].T
    return weight


def pack(
    weight: torch.Tensor,
    scheme: str,
    group: int | None = 128,
    *,
    symmetric: bool = True,
    order: torch.Tensor | None = None,
    version: int = 1,
) -> dict[str, torch.Tensor]:
    """Quantize a weight to the nearest codes: ``qweight``, ``qzeros``, ``scales`` (float16) and ``g_idx``.

    ``group`` columns share a scale, all of them with None. ``order`` is the order in which columns were quantized (act-order): its first
    ``group`` columns are the first group. The last word of a row or a column may have codes that stand for nothing.
    """
    bits, columns = BITS[scheme], weight.shape[1]
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[torch.arange(columns) if order is None else order] = torch.arange(columns, dtype=torch.int32) // (
        group or columns
    )
    numbers, most, count = weight.detach().double(), 2**bits - 1, int(g_idx.max()) + 1
    low = torch.stack([numbers[:, g_idx == g].amin(dim=1) for g in range(count)]).clamp(max=0)
    high = torch.stack([numbers[:, g_idx == g].amax(dim=1) for g in range(count)]).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = torch.where(high > low, (high - low) / most, 1.0).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales.double()).round().clamp(0, most)
    of_column = g_idx.long()
    codes = (numbers / scales.double()[of_column].T + zeros[of_column].T).round().clamp(0, most)
    return {
        "qweight": to_words(codes, bits).T.contiguous(),
        "qzeros": to_words((zeros - (2 - version)) % 2**bits, bits),
        "scales": scales,
        "g_idx": g_idx,
    }
