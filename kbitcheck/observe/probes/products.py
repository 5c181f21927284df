"""What a layer's products are in float64, and how far rounding may move what its kernels return."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from kbitcheck import backends


@dataclass(frozen=True, slots=True)
class Gradient:
    """dL/dx, (rows, in), as the chain rule demands it: ``expected``, how far from it rounding may be, and what the bound grows with."""

    expected: torch.Tensor
    bound: torch.Tensor
    spread: torch.Tensor


class Products:
    """The products of one layer. ``weight`` gives its weight, (out, in), in float64; ``half`` is what an autocast around it rounds to."""

    def __init__(self, module: nn.Module, weight: Callable[[], torch.Tensor], half: torch.dtype | None = None) -> None:
        self._module, self._weight, self._half = module, weight, half
        self._arithmetic = backends.arithmetic(module)

    def compute(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of the products of an input in ``dtype``."""
        return self._arithmetic.compute_dtype(self._module) or dtype or torch.float32

    def ulp(self, dtype: torch.dtype | None) -> float:
        """The coarsest rounding on the way of an input in ``dtype``."""
        compute = self.compute(dtype)
        unpacked = self._arithmetic.unpacked_dtype(self._module) or compute
        return max(torch.finfo(each).eps for each in {compute, unpacked, dtype or compute, self._half or compute})

    @property
    def accumulation(self) -> float:
        """What float32 loses at most of a gradient's sum, relative to the sum of magnitudes."""
        return float(backends.recognition(self._module).shape(self._module)[0] * 2.0**-24)

    def rounded(self, dtype: torch.dtype | None) -> torch.Tensor:
        """The weight as the kernels round it: what is left is the rounding of the result and, under autocast, of an operand."""
        compute = self.compute(dtype)
        return self._weight().to(self._arithmetic.unpacked_dtype(self._module) or compute).to(compute)

    def gradient(self, dy: torch.Tensor, dtype: torch.dtype | None) -> Gradient:
        """What is to leave an input in ``dtype`` for a gradient that enters the output."""
        rounded, compute = self.rounded(dtype), self.compute(dtype)
        magnitudes = rounded.float().abs()
        # Gradients that die out: an operand or a product below the smallest normal number may count as zero.
        vanished = torch.finfo(compute).tiny * (rounded.shape[0] + magnitudes.sum(0))
        flat = dy.reshape(-1, dy.shape[-1]).to(compute).double()
        spread = self._spread(flat.abs(), magnitudes)
        bound = (2 * self.ulp(dtype) + self.accumulation) * spread + vanished
        return Gradient(flat @ rounded.double(), bound, spread)

    def _spread(self, flat: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
        """At most the product, as float32 sums it: of numbers that are not negative it loses less than their count in ulps."""
        spread = (flat.float() @ magnitudes).double() * (1 - 2 * self.accumulation)
        return spread if bool(torch.isfinite(spread).all()) else flat @ magnitudes.double()
