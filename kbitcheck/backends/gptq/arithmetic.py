"""How GPTQModel's plain layer computes: the weight is unpacked in its scales' dtype and multiplied in the input's."""

from typing import Any

import torch
from kbitcheck_reference.formats import gptq as oracle

from kbitcheck.backends.protocol import Arithmetic


class GptqArithmetic(Arithmetic):
    """Products follow the input; torch's own backward multiplies by the weight that the forward unpacked."""

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.scales.dtype
        return dtype

    def adds_bias_apart(self, module: Any) -> bool:
        return True

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight = oracle.unpack(module).to(module.scales.dtype)
        return weight.to(dtype or weight.dtype)
