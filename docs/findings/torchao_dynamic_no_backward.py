"""torchao's dynamic int8 product has no backward for its input: the gradient ends at each layer, or the step raises."""

import sys

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

torch.manual_seed(0)
layer = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
quantize_(layer, Int8DynamicActivationInt8WeightConfig())
x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
y = layer(x)
print(f"the input requires grad, the output: {y.requires_grad}")
try:
    y.sum().backward()
except (RuntimeError, NotImplementedError) as error:
    print(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
print(f"gradient of the input: {x.grad if x.grad is None else x.grad.norm()}")
sys.exit(0 if x.grad is None else 1)
