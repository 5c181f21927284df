"""How the library's layer computes where no kernel of its own fits: it unpacks the weight in one dtype, and multiplies in that."""

from typing import Any

import torch
from kbitcheck_reference.formats import aqlm as oracle

from kbitcheck.backends.one_dtype import OneDtype


class AqlmArithmetic(OneDtype):
    """Inputs and bias have the dtype of the codebooks: torch's product of two dtypes raises."""

    def compute_dtype(self, module: Any) -> torch.dtype:
        return self.unpacked_dtype(module)

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.codebooks.dtype
        return dtype

    def adds_bias_apart(self, module: Any) -> bool:
        return False

    def dequantized(self, module: Any) -> torch.Tensor:
        """Exactly the library's where there is one codebook: a number of it times a scale, rounded once."""
        return oracle.unpack(module).to(module.codebooks.dtype)
