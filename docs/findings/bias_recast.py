"""bitsandbytes' layers cast their own bias in place in a forward, to the compute dtype (int8: to the input's dtype)."""

import sys

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn


def recast(layer: nn.Module) -> bool:
    """Whether one forward on bfloat16 changes the dtype and the numbers of a frozen float32 bias."""
    layer.to("cpu").requires_grad_(False)
    layer.bias.data = torch.linspace(0, 1, 64)
    before = layer.bias.data.clone()
    layer(torch.ones(2, 64, dtype=torch.bfloat16, requires_grad=True))
    print(f"{type(layer).__name__}: {before.dtype} -> {layer.bias.dtype}")
    return layer.bias.dtype != before.dtype and not torch.equal(layer.bias.float(), before)


layers = [Linear4bit(64, 64, compute_dtype=torch.bfloat16), Linear8bitLt(64, 64, has_fp16_weights=False)]
recasts = [recast(layer) for layer in layers]
sys.exit(0 if all(recasts) else 1)
