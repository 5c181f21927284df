"""torchao's weights on the meta device: its own function packs tensors without numbers."""

from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8Tensor, PerRow

from kbitcheck.backends.protocol import Packing


class TorchAOPacking(Packing):
    """Each weight that transformers' quantizer says it packs."""

    def quantize_empty(self, model: nn.Module, dtype: torch.dtype) -> None:
        quantizer: Any = model.hf_quantizer
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and quantizer.param_needs_quantization(model, f"{name}.weight"):
                packed = Int8Tensor.from_hp(module.weight.detach().to(dtype), PerRow())
                module.weight = nn.Parameter(packed, requires_grad=False)
