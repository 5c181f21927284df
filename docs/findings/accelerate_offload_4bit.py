"""A 4-bit layer whose weights accelerate offloads to the CPU has lost its scales at the next forward."""

import sys

import torch
from accelerate import cpu_offload
from bitsandbytes.nn import Linear4bit, Linear8bitLt

raised = {}
for layer in (Linear4bit(64, 64, bias=False), Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)):
    model = torch.nn.Sequential(layer).to("cpu").requires_grad_(False)
    cpu_offload(model, torch.device("cpu"))
    try:
        with torch.no_grad():
            model(torch.ones(1, 64))
        raised[type(layer).__name__] = ""
    except Exception as error:
        raised[type(layer).__name__] = f"{type(error).__name__}: {error}"
print(raised)
sys.exit(0 if raised["Linear4bit"] and not raised["Linear8bitLt"] else 1)
