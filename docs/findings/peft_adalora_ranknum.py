"""AdaLoRA's count of ranks, a constant by which it divides, is trained on a base in bfloat16, and is not saved."""

import sys
import warnings

import torch
from peft import AdaLoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

warnings.simplefilter("ignore")


def counted(dtype: torch.dtype) -> tuple[float, bool]:
    """The count of 4 ranks after three steps of AdamW, and whether it is in what PEFT saves."""
    base = nn.Sequential(nn.Linear(64, 64, bias=False).to(dtype))
    model = get_peft_model(base, AdaLoraConfig(init_r=4, target_modules=["0"], total_step=10))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.base_model.model(torch.ones(2, 64, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = any("ranknum" in name for name in get_peft_model_state_dict(model))
    return next(p.item() for name, p in model.named_parameters() if "ranknum" in name), saved


found = {str(dtype): counted(dtype) for dtype in (torch.float32, torch.bfloat16)}
print(f"count of 4 ranks after three steps, and whether it is saved: {found}")
sys.exit(0 if found["torch.float32"][0] == 4 and found["torch.bfloat16"][0] != 4 else 1)
