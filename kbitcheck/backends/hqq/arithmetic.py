"""How HQQ's layers compute: the weight is unpacked in the layer's own dtype, forward and backward, which inputs must have."""

from typing import Any

import torch

from kbitcheck.backends.protocol import Arithmetic


class HqqArithmetic(Arithmetic):
    """A layer takes inputs in its compute dtype alone, and has its bias in that."""

    def product_dtype(self, module: Any, x: torch.Tensor) -> torch.dtype:
        return self.unpacked_dtype(module)

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.compute_dtype
        return dtype

    def fixed_dtype(self, module: Any) -> torch.dtype | None:
        return self.unpacked_dtype(module)

    def adds_bias_apart(self, module: Any) -> bool:
        return True

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        with torch.no_grad():
            weight: torch.Tensor = module.dequantize()
        return weight.to(dtype or weight.dtype)
