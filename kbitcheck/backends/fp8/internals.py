"""The private names of transformers' FP8 layers that this backend needs; ``tests/unit/test_internals.py`` fails when one moves.

Each is there in transformers 5.23; 4.56 has the layer without a backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers.integrations import finegrained_fp8

LAYER = finegrained_fp8.FP8Linear
GROUPED: Any = getattr(finegrained_fp8, "FP8GroupedLinear", ())
# The slot of the GPU kernels, which transformers fills when a layer first runs.
SLOT = "_FINEGRAINED_FP8"


def _kernels(product: Callable[..., torch.Tensor]) -> Any:
    return finegrained_fp8.FineGrainedFP8(matmul=product, batched_matmul=_none, grouped_matmul=_none)


def _none(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise ImportError("the kernels of FP8 experts need a GPU")


def fill_slot(product: Callable[..., torch.Tensor]) -> None:
    """Have layers on a machine without a GPU call ``product`` where they would call the kernel."""
    if getattr(finegrained_fp8, SLOT) is None and not torch.cuda.is_available():
        setattr(finegrained_fp8, SLOT, _kernels(product))


@contextmanager
def slot_of(product: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Every layer calls ``product`` while the context is open."""
    with mock.patch.object(finegrained_fp8, SLOT, _kernels(product)):
        yield
