"""Tiny models of any architecture with three times as many blocks, so that there is something to cut."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kbitcheck.models.sources.architecture import Architecture
from kbitcheck.models.zoo.shrink import LAYER_KINDS, are_indices, is_depth

TIMES = 3


def deepened(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration's fields with three times as many blocks; lists by block are repeated."""
    depths = [v for k, v in config.items() if is_depth(k) and type(v) is int]
    depths += [len(v) for k, v in config.items() if LAYER_KINDS.fullmatch(k)]
    return {k: _deepened(k, v, max(depths, default=0)) for k, v in config.items()}


def _deepened(name: str, value: Any, layers: int) -> Any:
    if isinstance(value, dict) and "model_type" in value:
        return deepened(value)
    if type(value) is int and is_depth(name) and value > 1:
        return value * TIMES
    if isinstance(value, list) and layers > 1 and len(value) == layers and not are_indices(value, layers):
        return value * TIMES
    return value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Deep(Architecture):
    """An architecture, shrunk, with three times as many blocks as it would be shrunk to."""

    def fields(self) -> dict[str, Any]:
        return deepened(super(Deep, self).fields())


def deep(source: Architecture) -> Deep:
    """The deep form of an architecture."""
    return Deep(**{each.name: getattr(source, each.name) for each in fields(source)})
