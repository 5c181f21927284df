"""How compressed-tensors' layers compute once a forward unpacked them: in the dtype of their scales, as torch's own linear layers."""

from typing import Any

import torch
from kbitcheck_reference.formats import compressed_tensors as oracle

from kbitcheck.backends.protocol import Arithmetic


class CompressedArithmetic(Arithmetic):
    """A layer takes inputs in the dtype of its weight alone."""

    def product_dtype(self, module: Any, x: torch.Tensor) -> torch.dtype:
        return self.unpacked_dtype(module)

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.weight_scale.dtype
        return dtype

    def fixed_dtype(self, module: Any) -> torch.dtype | None:
        return self.unpacked_dtype(module)

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return oracle.unpack(module).to(dtype or module.weight_scale.dtype)
