"""How optimum-quanto's layers compute in training: in the dtype of their scales, forward and backward."""

from typing import Any

import torch

from kbitcheck.backends.one_dtype import OneDtype


class QuantoArithmetic(OneDtype):
    """The weight is unpacked to the dtype of its scales. An int8 layer casts its input to that; an int4 layer takes no other."""

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.weight.dtype
        return dtype

    def dequantized(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight.detach().dequantize()
        return weight
