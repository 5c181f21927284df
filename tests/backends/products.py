"""The backward of a quantized layer beside the oracle's weight."""

from typing import Any

import torch
from kbitcheck_reference import dequantized_weight


def assert_backward_is_the_product(layer: Any, dtype: torch.dtype, *, unpacked_to: torch.dtype | None = None) -> None:
    """The gradient of a layer's input is that of its output times the oracle's weight.

    The bound: the weight is rounded to the dtype that it is ``unpacked_to``, and to ``dtype``, half a step each, and the product to
    ``dtype``; its terms are summed in float32.
    """
    exact = dequantized_weight(layer)
    rows, columns = exact.shape
    x, dy = torch.randn(5, columns, dtype=dtype, requires_grad=True), torch.randn(5, rows, dtype=dtype)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    first = torch.finfo(unpacked_to).eps / 2 if unpacked_to is not None else 0.0
    bound = (first + torch.finfo(dtype).eps + rows * 2**-24) * (dy.double().abs() @ exact.abs())
    assert ((dx.double() - dy.double() @ exact).abs() <= bound).all()
