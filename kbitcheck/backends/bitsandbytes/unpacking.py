"""A fast way to unpack weights to float64, in memory that the caller passes; a property test holds it to the oracle's.

Two values a byte: the 256 pairs are looked up, which moves half as much memory as looking up each code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from kbitcheck_reference.formats import bitsandbytes as oracle

from kbitcheck.backends.bitsandbytes.recognise import is_4bit, scales

BYTES = 1 << 13  # that are looked up at once: their indices take four times as much, which fits a cache


def unpack(layer: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that a layer stands for: float64, (out, in), on the layer's device; in ``out`` where that is passed.

    Bitwise what the oracle unpacks. ``out`` is contiguous.
    """
    if not is_4bit(layer):
        values = layer.weight.detach().double() if out is None else out.copy_(layer.weight.detach())
        return values.mul_(scales(layer).detach().double().reshape(-1, 1) / oracle.INT8_STEPS)
    state = layer.weight.quant_state
    count = state.shape.numel()
    if getattr(state, "packing_format_for_cpu", False) or count % 2:
        weight = oracle.unpack(layer)
        return weight if out is None else out.copy_(weight)
    weight = torch.empty(tuple(state.shape), dtype=torch.float64, device=layer.weight.device) if out is None else out
    raw = oracle.raw_bytes(layer.weight.data, count)
    pairs = _pairs(state.quant_type).to(raw.device)
    for codes, piece in zip(raw.split(BYTES), weight.view(-1, 2).split(BYTES), strict=True):
        torch.index_select(pairs, 0, codes.int(), out=piece)
    oracle.scale_blocks(weight.view(-1), oracle.absmax(state), state.blocksize)
    return weight


@cache
def _pairs(scheme: str) -> torch.Tensor:
    """The values of both codes of each byte, (256, 2)."""
    codes = oracle.unpack_nibbles(torch.arange(256, dtype=torch.uint8), 512)
    return oracle.TABLES[scheme][codes.long()].view(256, 2)
