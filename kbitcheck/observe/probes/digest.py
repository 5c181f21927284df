"""Fingerprints of tensors: equal digests mean equal bits, or equal numbers whatever the dtype."""

from typing import Any

import torch
from xxhash import xxh3_128  # bound before any subject is imported, which may patch its module

from kbitcheck.observe import internals
from kbitcheck.observe.probes.parts import parts, wraps

CHUNK = 1 << 22


def bits(tensor: torch.Tensor) -> str:
    """Digest of a tensor's bytes in logical order; of a sharded one, of this process's part."""
    if wraps(type(tensor)):
        return xxh3_128("".join(map(bits, parts(tensor))).encode()).hexdigest()[:24]
    flat = internals.local(tensor.detach()).reshape(-1).contiguous()
    return _digest(flat.view(torch.uint8) if flat.numel() else flat, torch.uint8)


def value(tensor: torch.Tensor) -> str:
    """Digest of a floating tensor's numbers: the same before and after an exact cast; of one in float32, ``bits``."""
    flat = internals.local(tensor.detach()).reshape(-1)
    return _digest(flat, torch.float64 if flat.dtype is torch.float64 and not _narrow(flat) else torch.float32)


def _narrow(flat: torch.Tensor) -> bool:
    return all(bool((chunk.float() == chunk).all()) for chunk in flat.split(CHUNK) if not chunk.is_meta)


def _digest(flat: torch.Tensor, dtype: torch.dtype) -> str:
    if flat.device.type == "meta":
        return "meta"
    digest = xxh3_128()
    for chunk in flat.split(CHUNK) if flat.numel() else ():
        digest.update(chunk.to(dtype).cpu().numpy().data)
    return digest.hexdigest()[:24]


def of(field: Any) -> str:
    """Digest of a state's field: a tensor with its dtype and device, or the text of a plain value."""
    if isinstance(field, torch.Tensor):
        return f"{str(field.dtype).removeprefix('torch.')}{tuple(field.shape)}@{field.device.type}:{bits(field)}"
    return str(field)
