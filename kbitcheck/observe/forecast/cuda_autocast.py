"""CUDA's autocast for tensors that say they are on the CPU.

torch's dispatcher lists the operators that autocast handles on CUDA, also in a torch that is built without CUDA; how each
casts its arguments is stated here, as in torch's ``ATen/autocast_mode.h``.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kbitcheck.observe import internals
from kbitcheck.observe.probes.live import tensors

HALF_ARGUMENTS = frozenset((
    "_convolution", "_convolution.deprecated", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "cudnn_convolution",
    "cudnn_convolution_transpose", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot",
    "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot", "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
))  # fmt: skip
FLOAT32_RESULT = frozenset((
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
))  # fmt: skip
WIDEST_ARGUMENTS = frozenset((
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
))  # fmt: skip
APPENDED_DTYPE = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
REFUSED = frozenset({"binary_cross_entropy"})  # autocast on CUDA raises for it
# All others take float32 arguments.

Operator = Callable[..., Any]


class Watcher:
    """Hears what a step does that no operator shows. This one does not listen."""

    block: Hashable = None
    """The block whose forward runs; None beside the blocks."""

    def attends(self, kernel: str) -> None:
        """Attention takes a kernel."""

    def dropping(self, block: Hashable) -> AbstractContextManager[Any]:
        """Inside, autocast drops a cast that it kept since the forward of ``block``."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A cast that is kept, the weight that it is of, and the block whose forward made it."""

    weight: weakref.ref[Tensor]
    cast: Tensor
    block: Hashable


def half() -> torch.dtype | None:
    """The dtype that autocast casts to at the moment; None where it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


class Casts:
    """What autocast casts. Casts of trained float32 weights are kept until it ends, as torch keeps them."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._kept: dict[int, _Kept] = {}

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """The value in ``dtype`` if it is a floating tensor, other than a float64 one, or a list of them."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.cast(each, dtype) for each in value)
        if not _eligible(value) or value.dtype == dtype:
            return value
        trained = value.requires_grad and value.is_leaf and not internals.is_view(value)
        if not (trained and value.dtype == torch.float32 and dtype == half() and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        kept = self._kept.get(id(value))
        if kept is None or kept.weight() is not value:
            kept = self._kept[id(value)] = _Kept(weakref.ref(value), value.to(dtype), self._watcher.block)
        return kept.cast

    def clear(self) -> None:
        """Drop all that is kept."""
        while self._kept:
            first = next(iter(self._kept))
            with self._watcher.dropping(self._kept[first].block):
                del self._kept[first]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While entered, ``torch.autocast("cpu")`` casts as CUDA's does, in every thread."""
        clear = torch.clear_autocast_cache

        def clear_both() -> None:
            clear()
            self.clear()

        with mock.patch.object(torch, "clear_autocast_cache", clear_both), internals.autocast_kernels(self._kernels()):
            yield

    def _kernels(self) -> Iterator[tuple[str, Operator | None]]:
        """By operator, what autocast calls for it; None where it does nothing."""
        handled = internals.autocast_operators("CUDA") - REFUSED
        for name in handled | internals.autocast_operators("CPU"):
            yield name, self._kernel(name) if name in handled else None

    def _kernel(self, name: str) -> Operator:
        operator = internals.operator(APPENDED_DTYPE.get(name, name))
        if name in FLOAT32_RESULT or name in APPENDED_DTYPE:
            return _with_float32_result(operator)

        def call(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.float32
            if name in HALF_ARGUMENTS or (name in WIDEST_ARGUMENTS and not _wide(args, kwargs)):
                dtype = half() or dtype
            args = tuple(self.cast(value, dtype) for value in args)
            kwargs = {name: self.cast(value, dtype) for name, value in kwargs.items()}
            with internals.below_autocast():
                return operator(*args, **kwargs)

        return call


def _with_float32_result(operator: Operator) -> Operator:
    place = internals.argument_names(operator).index("dtype")

    def call(*args: Any, **kwargs: Any) -> Any:
        stated = args[place] if len(args) > place else kwargs.get("dtype")
        if stated is None and _eligible(args[0]):
            args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
        with internals.below_autocast():
            return operator(*args, **kwargs)

    return call


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _wide(*arguments: Any) -> bool:
    return any(tensor.dtype == torch.float32 for tensor in tensors(*arguments))
