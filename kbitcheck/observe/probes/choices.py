"""Choices, recorded in one run and imposed on another: a twin must use the experts that the model used, and gates beside zero."""

from __future__ import annotations

from typing import Any

import torch

from kbitcheck.observe.internals import ARGMAX, RELU, TOPK, TorchDispatchMode

# Up to this share of the largest number, rounding in bfloat16 can move a number to the other side of zero: of a sum and its terms.
BESIDE_ZERO = 2 * torch.finfo(torch.bfloat16).eps


class RecordChoices(TorchDispatchMode):
    """Collects the indices of every ``topk`` and ``argmax`` while it is entered, in order; with ``gates`` where each ``relu`` is open."""

    def __init__(self, *, gates: bool = False) -> None:
        super().__init__()
        self.indices: list[torch.Tensor] = []
        self._gates = gates

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is TOPK or func is ARGMAX:
            self.indices.append(output[1] if func is TOPK else output)
        elif func is RELU and self._gates:
            self.indices.append(output > 0)
        return output


class ImposeChoices(TorchDispatchMode):
    """Answers every ``topk`` and ``argmax`` with recorded indices, in order, and the values that are there.

    A ``relu`` is open where it was when recorded, but only of numbers that rounding can move to the other side of zero.
    """

    def __init__(self, indices: list[torch.Tensor]) -> None:
        super().__init__()
        self._indices = iter([each for each in indices if each.dtype is not torch.bool])
        self._gates = iter([each for each in indices if each.dtype is torch.bool])
        self.moved = False  # whether a gate would have been another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ARGMAX and (picked := next(self._indices, None)) is not None:
            return picked
        if func is TOPK and (indices := next(self._indices, None)) is not None:
            return args[0].gather(args[2] if len(args) > 2 else -1, indices), indices
        if func is RELU and (gate := next(self._gates, None)) is not None:
            return self._gated(args[0], gate)
        return func(*args, **(kwargs or {}))

    def _gated(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        output = x.relu()
        moved = (gate != (output > 0)) & (x.abs() <= BESIDE_ZERO * x.abs().amax())
        self.moved = self.moved or bool(moved.any())
        # Autograd lets a gradient through where the output is above zero.
        return torch.where(moved, gate * torch.finfo(x.dtype).tiny, output).to(x.dtype)
