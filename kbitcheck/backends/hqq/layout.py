"""The tensors of an HQQ checkpoint, by its configuration."""

from collections.abc import Mapping
from typing import Any

import torch
from kbitcheck_reference.formats.hqq import SLICES
from torch import nn

from kbitcheck.backends import packed

Settings = Mapping[str, Any]


def lay_out(model: nn.Module, config: Settings) -> None:
    """Put the packed tensors of each linear layer in its place, on the meta device; experts that are stacked stay."""
    own = config.get("quant_config") or {}
    skipped = config.get("skip_modules", ["lm_head"]) or ()
    names = {name: _kind(name) for name, _ in packed.linears(model, in_blocks=False)}
    by_kind = any(kind in own for kind in names.values() if kind not in skipped)
    for name, kind in names.items():
        settings = own.get(kind) if by_kind else own
        if kind not in skipped and settings:
            weights = settings["weight_quant_params"]
            dtype = next(model.get_submodule(name).parameters()).dtype
            packed.pack_linear(model, name, f"hqq-int{weights['nbits']}", _layout(weights, dtype))


def _kind(name: str) -> str:
    """What configurations call a layer in every block: its path without numbers and without ``model`` and ``layers``."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _layout(weights: Settings, dtype: torch.dtype) -> packed.Layout:
    bits, by_row = int(weights["nbits"]), bool(weights.get("axis", 0))

    def tensors(rows: int, columns: int) -> Any:
        size = weights.get("group_size") or (columns if by_row else rows)
        groups = rows * columns // size
        high, wide = (groups, size) if by_row else (size, groups)
        words = torch.int32 if bits == 3 else torch.uint8
        number = ((groups, 1) if by_row else (1, groups)), dtype
        shape = -(-high // SLICES[bits]), wide
        stored = dtype if weights.get("view_as_float") else words
        if stored is not words:
            shape = shape[0], shape[1] * words.itemsize // dtype.itemsize
        return {"W_q": (shape, stored), "scale": number, "zero": number}

    return tensors
