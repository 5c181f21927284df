"""After a state dict is loaded, a frozen layer of optimum-quanto has a packed weight that requires a gradient."""

import sys

import torch
from optimum.quanto import freeze, qint8, quantize

model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
quantize(model, weights=qint8)
freeze(model)
model.requires_grad_(False)
before = model[0].weight.requires_grad
model.load_state_dict(model.state_dict())
after = model[0].weight.requires_grad
print(f"the packed weight requires a gradient: before {before}, after {after}")
sys.exit(0 if after and not before else 1)
