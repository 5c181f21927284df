"""PEFT's DoRA on a bitsandbytes int8 layer on a CPU: a forward loses the weight's scales, and the next one raises."""

import sys
import warnings

import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")


def forwards(use_dora: bool) -> int:
    """How many of three forwards run."""
    base = nn.Sequential(Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], use_dora=use_dora))
    for count in range(3):
        try:
            model.base_model.model(torch.ones(2, 64))
        except AttributeError as error:
            print(f"forward {count + 1}: {error}")
            return count
    return 3


lora, dora = forwards(use_dora=False), forwards(use_dora=True)
print(f"forwards that run, of 3: LoRA {lora}, DoRA {dora}")
sys.exit(0 if (lora, dora) == (3, 1) else 1)
