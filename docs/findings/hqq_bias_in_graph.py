"""The bias of an HQQ layer made of a trainable one is no leaf: it holds the old bias, and the layer cannot be copied."""

import copy
import sys

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

dense = torch.nn.Linear(64, 32)
layer = HQQLinear(dense, BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=torch.bfloat16, device="cpu")
print(f"the bias requires grad: {layer.bias.requires_grad}; made by {type(layer.bias.grad_fn).__name__}")
try:
    copy.deepcopy(layer)
except RuntimeError as error:
    print(f"{type(error).__name__}: {str(error).partition('.')[0]}")
    sys.exit(0)
print("copied")
sys.exit(1)
