"""How HQQ's layers compute: the weight is unpacked in the layer's own dtype, forward and backward, which inputs must have."""

from typing import Any

import torch

from kbitcheck.backends.one_dtype import OneDtype


class HqqArithmetic(OneDtype):
    """A layer takes inputs in its compute dtype alone, and has its bias in that."""

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.compute_dtype
        return dtype

    def dequantized(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.dequantize()
        return weight
