"""A layer of compressed-tensors that rounds its inputs has no backward for them: the gradient ends there, without an error."""

import sys

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

eight = {"num_bits": 8, "type": "float"}
group = {
    "targets": ["Linear"],
    "weights": {**eight, "strategy": "channel"},
    "input_activations": {**eight, "strategy": "token", "dynamic": True},
}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).requires_grad_(False)
apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}))
layer = model[0]
layer.weight_scale.data = layer.weight.abs().amax(dim=1, keepdim=True) / 448
x = torch.randn(2, 8, requires_grad=True)
y = layer(x)
print(f"the output requires a gradient: {y.requires_grad}")
residual = (x + y).sum()
residual.backward()
print(f"gradient of sum(x + layer(x)): {x.grad.flatten().tolist()[:3]}, of sum(x) alone: [1.0, 1.0, 1.0]")
sys.exit(0 if not y.requires_grad else 1)
