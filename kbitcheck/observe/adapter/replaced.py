"""Tensors that an adapter stores whole, beside those of the base whose place they take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kbitcheck import backends
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts.adapter import Replacement, SavedAdapter, SavedTensor
from kbitcheck.core.memory_sizes import GIB
from kbitcheck.models.sources.source import Source
from kbitcheck.observe import device
from kbitcheck.observe.adapter import folder


def replacements(source: Source, path: Path, adapter: SavedAdapter) -> Mapping[str, Replacement]:
    """By the name of each tensor in the file, how it differs from the base's; those for which the base has no place are left out.

    Raises:
        Unavailable: the memory that is free does not hold the base.
    """
    if not any(layer.replacing for layer in adapter.layers.values()):
        return {}
    needed, free = sum(p.nbytes for p in source.meta(None).parameters()), device.free_bytes("cpu")
    if needed > free:
        raise Unavailable(f"the base takes about {needed / GIB:.0f} GiB, and {free / GIB:.0f} are free")
    model = source.load_unquantized()  # as the checkpoint is, packed or not
    seen = {}
    for layer in adapter.layers.values():
        for saved in layer.replacing:
            own = number(model, f"{layer.of_base}.{saved.of_base}")
            stored = folder.tensor(path, saved)
            if own is None or not stored.is_floating_point():
                continue
            if saved.rows is None and stored.dim() == own.dim() == 2:
                stored = stored[: len(own)]  # tokens were added
            meant = put_in(own.to(stored.dtype), stored, saved)
            if meant is None:
                continue
            before = own.to(stored.dtype).double()
            change = meant.double() - before
            rows = change.reshape(change.shape[0], -1).any(1)
            size = float(before.norm())
            seen[saved.key] = Replacement(
                change=float(change.norm()) / size if size else float(change.any()),
                rows=int(rows.sum()),
                count=len(rows),
            )
    return seen


def number(model: nn.Module, name: str) -> Tensor | None:
    """The numbers of a parameter, unpacked where it is quantized; None if the model has none of this name."""
    module, _, part = name.rpartition(".")
    quantized = dict(backends.quantized_layers(model)).get(module)
    if quantized is not None and part == "weight":
        return backends.arithmetic(quantized).exact(quantized)
    own = dict(model.named_parameters(remove_duplicate=False)).get(name)
    return None if own is None or not own.is_floating_point() else own.detach()


def put_in(own: Tensor, stored: Tensor, saved: SavedTensor) -> Tensor | None:
    """The base's tensor with the stored one in its place, or in the place of some of its rows; None where it does not fit."""
    if saved.rows is None:
        return stored.to(own.dtype) if stored.shape == own.shape else None
    if len(saved.rows) != len(stored) or max(saved.rows, default=0) >= len(own) or stored.shape[1:] != own.shape[1:]:
        return None
    return own.index_copy(0, torch.tensor(saved.rows, device=own.device), stored.to(own))
