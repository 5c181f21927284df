"""A block of a watched run beside its twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kbitcheck.observe.watch.blocks import Recorder, Twins, compared
from kbitcheck.observe.watch.guard import Guard


class PassesOn(nn.Module):
    """As T5's blocks of transformers 4: it returns the bias that it read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) * bias, bias


@pytest.mark.parametrize("read_again", [False, True])
def test_what_a_block_returns_as_it_was_passed_has_no_gradient_twice(read_again: bool) -> None:
    torch.manual_seed(0)
    block = PassesOn().requires_grad_(False)
    recorder = Recorder("block", block, Guard())
    x, bias = torch.randn(2, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    output, returned = block(x * 1, bias * 1)
    (output.square().sum() + (returned.sum() if read_again else 0)).backward()
    recorder.remove()
    seen = compared(recorder, Twins())
    assert not isinstance(seen, str), seen
    gaps = seen[0].gaps
    assert {"gradient that leaves x", *(() if read_again else ("gradient that leaves bias",))} <= set(gaps)
    assert max(gap.error for gap in gaps.values()) < 1e-6
