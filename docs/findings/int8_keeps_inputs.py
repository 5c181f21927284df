"""bitsandbytes' int8 functions keep their input as an attribute, which non-reentrant checkpointing cannot drop."""

import sys
import weakref

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import nn
from torch.utils.checkpoint import checkpoint


def keeps_its_input(layer: nn.Module) -> bool:
    """Whether what enters the layer, made inside a checkpointed region, is alive between forward and backward."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def region(x: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(inner := x * 2))
        return layer(inner)

    out = checkpoint(region, torch.ones(2, 8, 64, requires_grad=True), use_reentrant=False)
    alive = seen[0]() is not None
    out.sum().backward()
    return alive


plain = keeps_its_input(nn.Linear(64, 64))
training, evaluating = (Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu").train(mode) for mode in (True, False))
int8 = {"MatMul8bitFp": keeps_its_input(training), "MatMul8bitLt": keeps_its_input(evaluating)}
print(f"input kept under non-reentrant checkpointing: nn.Linear {plain}, {int8}")
sys.exit(0 if not plain and any(int8.values()) else 1)
