"""The 4-bit backward unpacks to the dtype of the quantization state, although the layer computes in float32."""

import sys

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

layer = Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4")
weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)  # as a checkpoint's
layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer)
layer.to("cpu")
eye = torch.eye(128, requires_grad=True)
out = layer(eye)
out.backward(torch.eye(128))
forward, backward = out.detach().T, eye.grad
off = float((backward - forward).norm() / forward.norm())
rounded = torch.equal(backward, forward.to(torch.bfloat16).float())
print(f"the backward's weight is off the forward's by {off:.1e}; it is the forward's rounded to bfloat16: {rounded}")
sys.exit(0 if off > 1e-4 else 1)
