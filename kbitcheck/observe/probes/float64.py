"""Keeps a float64 computation in float64, where a model's own code asks for float32 on the way."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
MAKES = frozenset({torch.zeros, torch.ones, torch.empty, torch.eye})


class KeepFloat64(TorchFunctionMode):
    """While it is entered, casts of float64 tensors and of integers to a narrower floating dtype give float64.

    Other tensors are cast as usual. New tensors that are named no dtype are float64: a part of a float64 tensor may be put into them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKES:
            return func(*args, **{**kwargs, "dtype": kwargs.get("dtype") or torch.float64})
        first = args[0] if args else None
        if not isinstance(first, Tensor) or (first.is_floating_point() and first.dtype != torch.float64):
            return func(*args, **kwargs)
        if func in CASTS:
            return first.double()
        if func is Tensor.to:
            args = tuple(_widened(each) for each in args)
        return func(*args, **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
