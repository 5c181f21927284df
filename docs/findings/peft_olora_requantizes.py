"""OLoRA on a 4-bit base quantizes what it leaves of each weight anew, so that the model starts as another function."""

import sys
import warnings

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")


def moved(start: bool | str) -> tuple[float, int]:
    """How far adapters that have not trained move the output, relatively, and how many packed bytes they change."""
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    base = nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"))
    packed, out = base[0].weight.data.clone(), base(x)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=start))
    now = model.base_model.model[0].base_layer.weight.data
    return ((model(x) - out).norm() / out.norm()).item(), int((now != packed).sum())


plain, olora = moved(True), moved("olora")
print(f"output moved by, and packed bytes of 2048 that changed: LoRA {plain}, OLoRA {olora}")
sys.exit(0 if plain == (0.0, 0) and olora[0] > 0.01 and olora[1] > 0 else 1)
