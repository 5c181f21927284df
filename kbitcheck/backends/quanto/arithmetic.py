"""How optimum-quanto's layers compute in training: in the dtype of their scales, forward and backward."""

from typing import Any

import torch

from kbitcheck.backends.protocol import Arithmetic


class QuantoArithmetic(Arithmetic):
    """The weight is unpacked to the dtype of its scales. An int8 layer casts its input to that; an int4 layer takes no other."""

    def product_dtype(self, module: Any, x: torch.Tensor) -> torch.dtype:
        return self.unpacked_dtype(module)

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.weight.dtype
        return dtype

    def fixed_dtype(self, module: Any) -> torch.dtype | None:
        return self.unpacked_dtype(module)

    def adds_bias_apart(self, module: Any) -> bool:
        return True

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        with torch.no_grad():
            weight: torch.Tensor = module.weight.detach().dequantize()
        return weight.to(dtype or weight.dtype)
