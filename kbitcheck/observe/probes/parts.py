"""What a tensor's numbers are stored in: tensors that wrap others, as some packed weights do, and sparse ones have no storage of their own."""

from collections.abc import Iterator
from functools import cache

import torch

from kbitcheck.observe.probes import internals

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a tensor's data, in a fixed order; of any other tensor the tensor itself."""
    cls = type(tensor)
    if tensor.layout in SPARSE:
        yield from internals.parts_of_sparse(tensor)
        return
    if not wraps(cls):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield from parts(getattr(tensor, name))


@cache  # it is asked of every tensor that an operator makes
def wraps(cls: type) -> bool:
    """Whether tensors of a class wrap others and are no sharded ones, whose parts are plain numbers."""
    return hasattr(cls, "__tensor_flatten__") and not cls.__module__.startswith("torch.")
