"""Bytes that steps hold and that preparing costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """Activation bytes alive between forward and backward, each storage once, whatever holds it.

    ``allowed`` is what checkpointing has to keep, from the plain run: the blocks' tensor arguments and results and all
    that was made outside the blocks. ``stack`` is what a bare quantized layer demonstrably keeps under checkpointing.
    ``steps`` are the bytes each block added in the checkpointed forward, ``step_allowed`` those of its inputs,
    ``plain_steps`` what it added in the plain one.
    """

    plain: int
    held: int
    allowed: int
    stack: int
    blocks: int
    peak: int
    steps: Mapping[str, int]
    step_allowed: Mapping[str, int]
    step_stack: Mapping[str, int]
    survivors: int
    plain_steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFacts:
    """Bytes while preparing, parameters and buffers included, counted as storages alive.

    ``cached`` is what emptying the accelerator's cache gave back afterwards; None on a CPU.
    """

    before: int
    after: int
    peak: int
    largest: int
    stale: int
    cached: int | None = None
