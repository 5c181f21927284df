"""An int8 layer that has run does not load the state dict that it gives."""

import sys

import torch
from bitsandbytes.nn import Linear8bitLt

layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu").requires_grad_(False)
layer.load_state_dict(layer.state_dict())
print("before a forward: loads")
layer(torch.ones(1, 64))
try:
    layer.load_state_dict(layer.state_dict())
    print("after a forward: loads")
    sys.exit(1)
except RuntimeError as error:
    print("after a forward:", error)
    sys.exit(0)
