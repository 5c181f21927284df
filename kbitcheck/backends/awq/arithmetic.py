"""How GPTQModel's plain layer of AWQ computes: in half precision, to whose dtype a forward casts the scales for good."""

from typing import Any

import torch
from kbitcheck_reference.formats import awq as oracle

from kbitcheck.backends.one_dtype import OneDtype

HALF = (torch.float16, torch.bfloat16)


class AwqArithmetic(OneDtype):
    """Inputs have the dtype of the scales, or the next forward changes these. What a layer returns has the dtype of its input.

    float32 is multiplied in float16, which is no coarser than what is said here.
    """

    def compute_dtype(self, module: Any) -> torch.dtype:
        return self.unpacked_dtype(module)

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.scales.dtype
        return dtype

    def dequantized(self, module: Any) -> torch.Tensor:
        return oracle.unpack(module).to(module.scales.dtype)
