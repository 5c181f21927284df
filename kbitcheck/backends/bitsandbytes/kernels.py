"""What bitsandbytes' kernels save and allocate, for tensors without numbers."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import bitsandbytes
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from kbitcheck.backends.protocol import Kernels

Fake = Callable[[Tensor], Tensor]


class BitsAndBytesKernels(Kernels):
    """States become fakes; int8 takes the CUDA function where the device is one, and no feature is an outlier."""

    def fake(self, module: Any, real: Mapping[str, Any], tensor: Fake) -> None:
        if isinstance(module, ParametrizationList):
            own = next(each for each in module if isinstance(each, Bnb4bitParametrization))
            own.quant_state = _state(own.quant_state, tensor)
            return
        weight, packed = module.weight, real["weight"]
        vars(weight).update(CB=None, SCB=None)  # what the layers look for on their weight
        if isinstance(packed, Params4bit):
            weight.quant_state = _state(packed.quant_state, tensor)
        else:
            rows = module.state.SCB if packed.SCB is None else packed.SCB
            module.state.CB, module.state.SCB = weight, tensor(rows)

    def on_device(self, device: str) -> AbstractContextManager[Any]:
        return mock.patch.object(bitsandbytes, "matmul", _int8_on_cuda) if device == "cuda" else nullcontext()

    def operator(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        if func is torch.ops.bitsandbytes.int8_vectorwise_quant.default:
            return func, args[:1], {}  # without a threshold
        if func is torch.ops.bitsandbytes.int8_mixed_scaled_mm.default:
            return _without_outliers(*args)
        return func, args, kwargs


def _state(state: QuantState, tensor: Fake) -> QuantState:
    fake = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        if isinstance(getattr(state, name), Tensor):
            setattr(fake, name, tensor(getattr(state, name)))
    if state.state2 is not None:
        fake.state2 = _state(state.state2, tensor)
    return fake


def _without_outliers(
    full: Tensor, packed: Tensor, weight: Tensor, scales: Tensor, weight_scales: Tensor, *rest: Tensor | None
) -> tuple[Any, Any, dict[str, Any]]:
    """The int8 product that is left when no feature is an outlier, and which is returned in a pair."""
    bias = rest[1] if len(rest) > 1 else None  # the first of the rest lists the outliers

    def product(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.ops.bitsandbytes.int8_scaled_mm.default(*args, **kwargs), None

    return product, (packed, weight, scales, weight_scales), {"bias": bias, "dtype": full.dtype}


def _int8_on_cuda(
    A: Tensor,  # noqa: N803  (bitsandbytes' names)
    B: Tensor,  # noqa: N803
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``bitsandbytes.matmul`` with the function it takes for CUDA tensors."""
    product: Tensor = MatMul8bitLt.apply(A, B, out, bias, state)
    return product
