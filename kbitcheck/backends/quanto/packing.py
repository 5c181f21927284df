"""optimum-quanto's weights on the meta device: its own functions pack tensors without numbers."""

from typing import Any

import torch
from optimum.quanto import QModuleMixin
from torch import nn

from kbitcheck.backends.protocol import Packing


class QuantoPacking(Packing):
    """Each layer that transformers put in is frozen, as loading does."""

    def quantize_empty(self, model: nn.Module, dtype: torch.dtype) -> None:
        module: Any
        for module in model.modules():
            if isinstance(module, QModuleMixin) and not module.frozen:
                module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
                module.freeze()
                module.weight.requires_grad = False
                for name, _ in list(module.named_buffers(recurse=False)):  # transformers makes them anew, in float32
                    setattr(module, name, torch.ones((), dtype=torch.float32, device="meta"))
