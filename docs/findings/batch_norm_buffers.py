"""Upcasting only parameters breaks batch norm on a CPU: its running statistics are buffers and stay in half precision."""

import sys

import torch
from torch import nn

norm = nn.BatchNorm1d(4).to(torch.bfloat16).train()
for parameter in norm.parameters():  # as peft.prepare_model_for_kbit_training does
    parameter.data = parameter.data.to(torch.float32)
try:
    norm(torch.randn(2, 4, 8))
except RuntimeError as error:
    print(error)
    sys.exit(0)
sys.exit(1)
