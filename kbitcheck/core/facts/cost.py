"""What computing a fact takes, and what it runs on."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Literal

RunsOn = Literal["static", "whole", "cut", "block"]


@dataclass(frozen=True, slots=True)
class Passes:
    """How often a model runs, is copied or is read, counted at its outermost module.

    Forwards and backwards in float64 are counted apart; ``float64_products`` are those of every quantized layer outside a
    twin. A recompute belongs to its backward. ``copies`` are deep copies, also those that replace quantized layers by a
    twin's; ``calls`` are of the implementation; a snapshot reads every bit. ``predicted`` are steps on tensors without
    numbers.
    """

    forwards: int = 0
    backwards: int = 0
    float64_forwards: int = 0
    float64_backwards: int = 0
    float64_products: int = 0
    copies: int = 0
    calls: int = 0
    snapshots: int = 0
    predicted: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


NO_PASSES = Passes()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a fact takes beyond the facts that it ``needs``.

    It runs ``on`` the whole model, on a cut of it or on its blocks one by one, or is read off (``static``). ``models`` of
    them exist at a time beside the base. What is ``shared`` is kept with the base, for all of its cases. A ``witness`` is
    read only after a failure. ``large`` is the cost of a large model (``core.machine.LARGE_BYTES``) where it differs.
    """

    on: RunsOn = "static"
    passes: Passes = field(default=NO_PASSES)
    needs: tuple[str, ...] = ()
    models: int = 0
    shared: bool = False
    witness: bool = False
    large: Cost | None = None
