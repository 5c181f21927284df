"""Which weights a layer's kernel is said to misread: those that are off by more than rounding to the kernel's dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from kbitcheck import backends
from kbitcheck.observe.probes.layers import Weights

STEP = 2.0**-24  # between float16's smallest numbers, and of them all below 2**-14

FAULTS = {
    "": lambda weight: weight,
    "one number, by a step": lambda weight: weight + STEP * torch.eye(*weight.shape),
    "zeros in place of subnormal numbers": lambda weight: weight * (weight.abs() >= 2.0**-14),
}


@pytest.mark.parametrize("size", [2.0**-19, 2.0**-15, 1.0])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_may_round_to_half_a_step_of_subnormal_numbers(
    fault: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer: Any = Linear4bit(64, 64, bias=False, compute_dtype=torch.float16, quant_type="nf4")
    layer.weight.data = (torch.randn(64, 64) * size).half()
    layer = layer.to("cpu")
    arithmetic, read = backends.arithmetic(layer), FAULTS[fault]
    exact = arithmetic.exact(layer)
    monkeypatch.setattr(arithmetic, "unpacked", lambda *_: read(exact.half().float()))
    monkeypatch.setattr(arithmetic, "unpacked_dtype", lambda _: torch.float16)
    # Large numbers are rounded by more than such a step.
    assert bool(Weights(nn.Sequential(layer)).misread) is bool(fault and size < 1)
