"""A model that optimum-quanto quantized cannot be copied: its weights have no clone of their class."""

import copy
import sys

import torch
from optimum.quanto import QLinear, qint8

layer = QLinear.from_module(torch.nn.Linear(64, 32), weights=qint8)
layer.freeze()
try:
    copy.deepcopy(layer)
except RuntimeError as error:
    print(f"{type(error).__name__}: {str(error).partition('.')[0]}")
    print(f"the class of a weight's clone: {type(layer.weight.detach().clone()).__name__}")
    sys.exit(0)
print("copied")
sys.exit(1)
