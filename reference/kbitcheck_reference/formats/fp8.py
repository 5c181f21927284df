"""Float64 dequantization of fine-grained FP8: e4m3 numbers times the scale of their block of rows and columns.

Sources: FP8 Formats for Deep Learning (arXiv 2209.05433) for e4m3; DeepSeek-V3 (arXiv 2412.19437), section 3.3.2, for blocks of
weights and for the tiles of inputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PACKAGE = "transformers.integrations.finegrained_fp8"
LARGEST = 448.0
"""The largest number of e4m3."""
CODES = torch.float8_e4m3fn


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds e4m3 numbers."""
    return parameter.dtype == CODES


def holds(module: nn.Module) -> bool:
    """Whether a module owns one matrix of such numbers with its scales; layers of several groups or experts are none."""
    names = {base.__name__ for base in type(module).__mro__}
    weight = module._parameters.get("weight")
    return "FP8Linear" in names and "FP8GroupedLinear" not in names and weight is not None and packs(weight)


def unpack(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, float64, ``(out, in)``; nothing of the layer changes."""
    owner: Any = layer
    return dequantize_fp8(owner.weight.detach(), owner.weight_scale_inv.detach(), owner.block_size)


def dequantize_fp8(codes: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None) -> torch.Tensor:
    """Dequantize e4m3 codes ``(out, in)`` to float64.

    ``scale`` has one number for each block of ``block`` rows and columns, of which the last ones may be short; without ``block``,
    one number for the whole weight.
    """
    values = codes.double()
    if block is None:
        return values * scale.double()
    (rows, columns), (high, wide) = codes.shape, block
    if scale.shape != (-(-rows // high), -(-columns // wide)):
        raise ValueError(
            f"{rows} × {columns} numbers in blocks of {high} × {wide} cannot have {tuple(scale.shape)} scales"
        )
    row, column = torch.arange(rows, device=scale.device) // high, torch.arange(columns, device=scale.device) // wide
    return values * scale.double()[row.unsqueeze(1), column]


def pack(weight: torch.Tensor, scheme: str, block: Sequence[int] = (128, 128)) -> dict[str, torch.Tensor]:
    """Quantize a weight: ``weight`` (e4m3, ``(out, in)``) and ``weight_scale_inv`` (float32, one a block).

    Each block's largest magnitude becomes the largest number of e4m3; a block of zeros has scale one.
    """
    (rows, columns), (high, wide) = weight.shape, block
    padded = nn.functional.pad(weight.detach().double(), (0, -columns % wide, 0, -rows % high))
    blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))  # (blocks, rows, blocks, columns)
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest)).float()
    codes = (blocks / scale.double()[:, None, :, None]).clamp(-LARGEST, LARGEST).flatten(0, 1).flatten(1, 2)
    return {"weight": codes[:rows, :columns].to(CODES), "weight_scale_inv": scale}


def round_input(x: torch.Tensor, columns: int) -> torch.Tensor:
    """An input as the products see it: each tile of one row and ``columns`` columns rounded to e4m3 by its largest magnitude."""
    count = x.shape[-1]
    tiles = nn.functional.pad(x, (0, -count % columns)).unflatten(-1, (-1, columns)).float()
    scale = (tiles.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (tiles / scale).clamp(-LARGEST, LARGEST).to(CODES)
    rounded: torch.Tensor = codes.float() * scale
    return rounded.flatten(-2)[..., :count]
