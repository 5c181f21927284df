"""How torchao's int8 weights compute in training."""

from typing import Any

import torch

from kbitcheck.backends.protocol import Arithmetic


class TorchAOArithmetic(Arithmetic):
    """The weight is unpacked to its own dtype; products follow the input."""

    def unpacked_dtype(self, module: Any) -> torch.dtype | None:
        dtype: torch.dtype = module.weight.dtype
        return dtype

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight: torch.Tensor = module.weight.dequantize(dtype or module.weight.dtype)
        return weight.detach()
