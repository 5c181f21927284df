"""Routers' choices, recorded in one run and imposed on another: a twin must use the experts that the model used."""

from __future__ import annotations

from typing import Any

import torch

from kbitcheck.observe.internals import ARGMAX, TOPK, TorchDispatchMode


class RecordChoices(TorchDispatchMode):
    """Collects the indices of every ``topk`` and ``argmax`` while it is entered, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is TOPK or func is ARGMAX:
            self.indices.append(output[1] if func is TOPK else output)
        return output


class ImposeChoices(TorchDispatchMode):
    """Answers every ``topk`` and ``argmax`` with recorded indices, in order, and the values that are there."""

    def __init__(self, indices: list[torch.Tensor]) -> None:
        super().__init__()
        self._indices = iter(indices)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ARGMAX:
            return next(self._indices)
        if func is TOPK:
            indices = next(self._indices)
            return args[0].gather(args[2] if len(args) > 2 else -1, indices), indices
        return func(*args, **(kwargs or {}))
