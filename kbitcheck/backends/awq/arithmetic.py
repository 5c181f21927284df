"""How GPTQModel's plain layer of AWQ computes: in half precision, to whose dtype a forward casts the scales for good."""

from typing import Any

import torch
from kbitcheck_reference.formats import awq as oracle

from kbitcheck.backends.one_dtype import OneDtype

HALF = (torch.float16, torch.bfloat16)


class AwqArithmetic(OneDtype):
    """Inputs have the dtype of the scales, or the next forward changes these; float32 is cast to float16."""

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.scales.dtype
        return dtype

    def product_dtype(self, module: Any, x: torch.Tensor) -> torch.dtype:
        return x.dtype if x.dtype in HALF else torch.float16

    def dequantized(self, module: Any) -> torch.Tensor:
        return oracle.unpack(module).to(module.scales.dtype)
