"""Packed weights and their states on the meta device, to the byte."""

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from kbitcheck.backends.protocol import Packing

META = torch.device("meta")


class BitsAndBytesPacking(Packing):
    """bitsandbytes' own functions run on the meta device, and say what a packed weight and its state look like."""

    def quantize_empty(self, model: nn.Module, dtype: torch.dtype) -> None:
        # Never to be made on the meta device.
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
        for module in model.modules():
            if isinstance(module, Linear4bit | Linear8bitLt):
                _quantize(module, dtype)


def _quantize(module: Any, dtype: torch.dtype) -> None:
    full = torch.empty(module.out_features, module.in_features, dtype=dtype, device=META)
    settings = {k: v for k, v in module.weight.__dict__.items() if k != "SCB"}
    kind: Any = Params4bit if isinstance(module, Linear4bit) else Int8Params
    weight = kind(full, requires_grad=False, **settings)
    weight._quantize(META)  # ``to`` leaves meta tensors alone (private, seen in bitsandbytes 0.50.2)
    module.weight = weight
    if isinstance(module, Linear4bit):
        state = module.quant_state = weight.quant_state
        if state.nested:
            state.offset = torch.zeros((), dtype=state.offset.dtype)  # ``state_dict`` reads it
