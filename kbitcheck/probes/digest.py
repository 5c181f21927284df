"""Fingerprints of tensors: equal digests mean equal bits, or equal numbers whatever the dtype."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

CHUNK = 1 << 22


def bits(tensor: torch.Tensor) -> str:
    """Digest of a tensor's bytes in logical order."""
    flat = tensor.detach().reshape(-1).contiguous()
    if flat.device.type == "meta":
        return "meta"
    digest = hashlib.blake2b(digest_size=12)
    for chunk in flat.view(torch.uint8).split(CHUNK) if flat.numel() else ():
        digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


def value(tensor: torch.Tensor) -> str:
    """Digest of a floating tensor's numbers as float64: the same before and after an exact cast."""
    flat = tensor.detach().reshape(-1)
    if flat.device.type == "meta":
        return "meta"
    digest = hashlib.blake2b(digest_size=12)
    for chunk in flat.split(CHUNK) if flat.numel() else ():
        digest.update(chunk.to(torch.float64).cpu().numpy().data)
    return digest.hexdigest()


def of(field: Any) -> str:
    """Digest of a state's field: a tensor with its dtype and device, or the text of a plain value."""
    if isinstance(field, torch.Tensor):
        return f"{str(field.dtype).removeprefix('torch.')}{tuple(field.shape)}@{field.device.type}:{bits(field)}"
    return str(field)
