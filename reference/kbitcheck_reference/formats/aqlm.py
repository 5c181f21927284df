"""Float64 dequantization of AQLM weights: each block of rows and columns is a sum of vectors of codebooks, times a scale of its rows.

Source: Extreme Compression of Large Language Models via Additive Quantization (arXiv 2401.06118), and the published checkpoints' layout:
``codes`` ``(out blocks, in blocks, codebooks)``, whose signed numbers stand for unsigned ones, ``codebooks``
``(codebooks, vectors, rows, columns)`` and ``scales`` ``(out blocks, 1, 1, 1)``.
"""

from typing import Any

import torch
from torch import nn

PACKAGE = ""
FIXES_DTYPES = True
"""A layer multiplies its input and adds its bias in the dtype of its codebooks, so that nothing around it may be cast."""


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds codes, which are integers of 8 or 16 bits; the three axes tell them from other integers."""
    return parameter.dtype in (torch.int8, torch.int16) and parameter.dim() == 3


def holds(module: nn.Module) -> bool:
    """Whether a module owns codes, codebooks and scales of one matrix."""
    return all(isinstance(getattr(module, part, None), torch.Tensor) for part in ("codes", "codebooks", "scales"))


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes.

    A forward of the library on a CPU lays out codes of 8 bits anew, blocks of columns first.
    """
    owner: Any = layer
    codes, scales = owner.codes.detach(), owner.scales.detach()
    codes = codes if codes.shape[0] == scales.shape[0] else codes.transpose(0, 1)
    return dequantize(codes, owner.codebooks.detach(), scales)


def dequantize(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize codes to float64, ``(out, in)``."""
    count, vectors, _, _ = codebooks.shape
    unsigned = codes.long() % vectors
    parts = [codebooks.double()[k][unsigned[..., k]] for k in range(count)]
    blocks: torch.Tensor = sum(parts[1:], start=parts[0]) * scales.double()
    return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def pack(
    weight: torch.Tensor, scheme: str, *, columns: int = 8, rows: int = 1, codebooks: int = 2, bits: int = 8
) -> dict[str, torch.Tensor]:
    """Quantize a weight: its own blocks are the vectors of the first codebook, what is left over those of the next; nearest ones are chosen.

    Blocks have ``rows`` and ``columns``. No calibration: what matters is that the layout is right.

    Raises:
        ValueError: the weight has no whole number of blocks.
    """
    high, wide = weight.shape
    if high % rows or wide % columns:
        raise ValueError(f"{high} × {wide} numbers have no whole blocks of {rows} × {columns}")
    numbers = weight.detach().double().unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
    scales = numbers.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float16).tiny).half()
    left = (numbers / scales.double()).flatten(0, 1).flatten(1)  # (blocks, numbers of a block)
    books, codes = [], []
    for _ in range(codebooks):
        picked = torch.linspace(0, len(left) - 1, 2**bits).long()
        book = left[picked].half()
        code = torch.cdist(left, book.double()).argmin(dim=1)
        left = left - book.double()[code]
        books.append(book.unflatten(1, (rows, columns)))
        codes.append(code)
    stacked = torch.stack(codes, dim=-1).view(high // rows, wide // columns, codebooks)
    signed = torch.where(stacked >= 2 ** (bits - 1), stacked - 2**bits, stacked)
    kind = torch.int8 if bits <= 8 else torch.int16
    return {"codes": signed.to(kind), "codebooks": torch.stack(books), "scales": scales}
