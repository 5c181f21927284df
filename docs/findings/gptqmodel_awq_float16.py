"""GPTQModel's AWQ layer multiplies float32 inputs in float16, backward too, and a forward casts its scales for good."""

import sys

import torch
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

torch.manual_seed(0)
layer = AwqTorchLinear(4, 32, False, False, 64, 64, register_buffers=True)
layer.scales.copy_(torch.rand(2, 64) / 64)
layer.qweight.random_()
layer.post_init()
x = torch.randn(8, 64, requires_grad=True)
(dx,) = torch.autograd.grad(layer(x), x, torch.full((8, 64), 1e-8))
print(f"{dx.dtype} input: a gradient of 1e-8 leaves {(dx == 0).float().mean():.0%} of the input's gradient zero")
before = layer.scales.clone()
layer(torch.randn(1, 64, dtype=torch.bfloat16))
layer(torch.randn(1, 64, dtype=torch.float16))
changed = (layer.scales != before).float().mean().item()
print(f"after one input in bfloat16 and one in float16, {changed:.0%} of the scales have changed")
sys.exit(0 if changed and not dx.any() else 1)
