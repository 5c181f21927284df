"""Layers that unpack their weight in one dtype of their own and multiply in that, forward and backward."""

from typing import Any

import torch

from kbitcheck.backends.protocol import Arithmetic


class OneDtype(Arithmetic):
    """Inputs have that dtype or are cast to it. A backend says which it is, and how a layer unpacks its weight."""

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        raise NotImplementedError

    def dequantized(self, module: Any) -> torch.Tensor:
        """The weight as the layer's own kernels unpack it."""
        raise NotImplementedError

    def product_dtype(self, module: Any, x: torch.Tensor) -> torch.dtype:
        return self.unpacked_dtype(module)

    def fixed_dtype(self, module: Any) -> torch.dtype | None:
        return self.unpacked_dtype(module)

    def adds_bias_apart(self, module: Any) -> bool:
        return True

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        with torch.no_grad():
            weight = self.dequantized(module)
        return weight.to(dtype or weight.dtype)
