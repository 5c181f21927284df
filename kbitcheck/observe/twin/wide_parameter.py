"""A parameter that computes in a wider dtype than it is stored in, so that a float twin holds no second copy of it."""

from collections.abc import Callable
from typing import Any, Self

import torch

from kbitcheck.observe import internals

aten = torch.ops.aten
# What only says otherwise which elements are meant, or in what order.
VIEWS = frozenset({
    aten.alias.default, aten.detach.default, aten.expand.default, aten.permute.default, aten.select.int,
    aten.slice.Tensor, aten.split.Tensor, aten.squeeze.dim, aten.t.default, aten.transpose.int, aten.unbind.int,
    aten.unsqueeze.default, aten.view.default,
})  # fmt: skip
PIECE = 1 << 20  # elements of a matrix that are widened at once for a product
# What picks elements, before they are widened.
PICKS = frozenset({aten.embedding.default, aten.index_select.default, aten.index.Tensor})


class Widened(torch.Tensor):
    """A frozen tensor that reads as ``dtype``; its numbers are those of ``stored``, widened whenever they are used.

    Widening is exact, so results are bitwise those of a widened copy, but for products with large matrices, which are
    computed piece by piece.
    """

    stored: torch.Tensor

    @staticmethod
    def __new__(cls, stored: torch.Tensor, dtype: torch.dtype) -> Self:
        wide: Self = internals.tensor_that_computes_as(cls, stored, dtype)
        wide.stored = stored
        return wide

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first: Any = args[0]
        if isinstance(first, Widened) and internals.writes_to_arguments(func):
            raise RuntimeError(f"{func} writes to a weight of the float twin")
        if func is aten.detach.default and isinstance(first, Unpacked):
            return Unpacked(first, first.read)
        if func in VIEWS:
            stored = func(first.stored, *args[1:], **kwargs)
            return internals.tree_map_only(torch.Tensor, lambda t: Widened(t, first.dtype), stored)
        if func in PICKS and isinstance(first, Widened):
            return func(first.stored, *args[1:], **kwargs).to(first.dtype)
        if func is aten.mm.default and isinstance(args[1], Widened) and args[1].numel() > PIECE:
            return _product(args[0], args[1].stored)
        args, kwargs = internals.tree_map_only(Widened, lambda t: t.stored.to(t.dtype), (args, kwargs))
        return func(*args, **kwargs)


class Unpacked(Widened):
    """A quantized layer's weight, which ``read`` unpacks anew whenever it is used; ``like`` has its shape, dtype and device."""

    read: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> Self:
        unpacked: Self = internals.tensor_that_computes_as(cls, like, like.dtype)
        unpacked.read = read
        return unpacked

    @property
    def stored(self) -> torch.Tensor:  # type: ignore[override]
        """The unpacked numbers, with the shape of the weight."""
        return self.read()


def _product(x: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """``x @ stored`` in the dtype of ``x``, (n, rows), without that matrix as a whole in it."""
    rows, columns = stored.shape
    size = max(1, PIECE // min(rows, columns))
    # In float32 no sum is split: its rounding would be another than that of the model.
    if columns > rows or x.dtype is not torch.float64:
        size = size if columns > rows else max(1, PIECE // rows)
        # Made first: results that were made between the pieces, and stay, would leave the heap in pieces, too.
        product = x.new_empty(x.shape[0], columns)
        for place, piece in zip(product.split(size, dim=1), stored.split(size, dim=1), strict=True):
            place.copy_(x @ piece.to(x.dtype))
        return product
    total = x.new_zeros(x.shape[0], columns)
    for part, piece in zip(x.split(size, dim=1), stored.split(size), strict=True):
        total.addmm_(part, piece.double())
    return total
