"""Integers that keep their numbers in a step without numbers: grids, lengths and positions of images, masks of their tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kbitcheck.observe import internals
from kbitcheck.observe.forecast.internals import without_modes
from kbitcheck.observe.probes.live import tensors

# A product of two such sides, as a mask of all tokens by all has them, is the most that is computed before its size is known.
SIDE = 1 << 11
MOST = SIDE * SIDE
# Numbers that are not there differ from any that is stated, as a model asks that looks for images that are padding.
COMPARED = {torch.ops.aten.eq.Scalar: False, torch.ops.aten.ne.Scalar: True}


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is a real one."""
    return not isinstance(tensor, internals.FakeTensor) and tensor.device.type != "meta"


def with_numbers(func: Any, args: Any, kwargs: Mapping[str, Any], infer: Callable[[], Any]) -> Any:
    """What an operator returns: computed where it reads nothing but numbers, and makes few; else as inferred."""
    if func in COMPARED and args[0].is_floating_point() and not has_numbers(args[0]):
        with without_modes():
            return torch.full(args[0].shape, COMPARED[func])
    arguments = list(tensors(args, tuple(kwargs.values())))
    if arguments and all(map(has_numbers, arguments)):
        if sum(t.numel() for t in arguments) > SIDE and not _few(infer):
            return infer()
        return _computed(func, args, kwargs)
    if arguments:
        return infer()
    made = infer()
    exact = isinstance(made, Tensor) and not made.is_floating_point() and not made.is_complex()
    return _computed(func, args, kwargs) if exact and made.numel() <= MOST else made


def by_numbers(index: Tensor | None) -> list[Tensor | None]:
    """An index of a tensor, a mask as the places where it is set: all of them where it has no numbers."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    if has_numbers(index):
        with without_modes():
            return [*index.nonzero().unbind(1)]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in index.shape]


def _few(infer: Callable[[], Any]) -> bool:
    try:
        return sum(t.numel() for t in tensors(infer())) <= MOST
    except (RuntimeError, NotImplementedError):  # how many depends on the numbers: not more than there are
        return True


def _computed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    with without_modes():
        return func(*args, **kwargs)
