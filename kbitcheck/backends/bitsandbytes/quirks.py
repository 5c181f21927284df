"""What bitsandbytes does behind a model's back, and how to keep it from that."""

from __future__ import annotations

from torch import nn


def never_repacked(model: nn.Module) -> None:
    """Switch off the repacking of 4-bit weights in a forward in eval mode on CPUs with AVX512-BF16.

    It rewrites the packed weights in place, rounds their scales to bfloat16, drops the nested state, and raises where
    the rows are no multiple of 32 or the columns of 64 (0.50.2, ``_convert_weight_packed_for_cpu``). It serves
    inference alone; with it, what a check sees would depend on the CPU, and looking at a model would change it.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.__dict__["support_avx512bf16_for_cpu"] = False
