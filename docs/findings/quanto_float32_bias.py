"""An optimum-quanto layer with a float32 bias, as a preparation leaves it, returns float32 and has no backward."""

import sys

import torch
from optimum.quanto import QLinear, qint8

torch.manual_seed(0)
layer = QLinear.from_module(torch.nn.Linear(64, 64, dtype=torch.bfloat16), weights=qint8)
layer.freeze()
layer.requires_grad_(False)
layer.bias.data = layer.bias.data.float()
x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
y = layer(x)
print(f"input {x.dtype}, bias {layer.bias.dtype}, output {y.dtype}")
try:
    y.sum().backward()
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(0)
print(f"gradient of the input: {x.grad.dtype}")
sys.exit(1)
