"""PEFT's HRA multiplies by the integers that bitsandbytes stores for an int8 weight, without their scales."""

import sys
import warnings

import torch
from bitsandbytes.nn import Linear8bitLt
from peft import HRAConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
x = torch.randn(4, 64)
base = nn.Sequential(Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu"))
base[0].weight.requires_grad_(False)
before = base(x).norm().item()
# Its start is an identity: pairs of reflections that undo each other.
model = get_peft_model(base, HRAConfig(r=4, target_modules=["0"]))
after = model(x).norm().item()
with model.disable_adapter():
    disabled = model(x).norm().item()
print(f"norm of the output: {before:.4g}; with an untrained HRA {after:.4g}; with it disabled {disabled:.4g}")
sys.exit(0 if after > 100 * before else 1)
