"""Which blocks round otherwise when they are checkpointed: those whose input something else reads too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kbitcheck.observe.probes import blocks

layers: Any = pytest.importorskip("transformers.modeling_layers", reason="this transformers has no such layer")


class Block(layers.GradientCheckpointingLayer):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return x + self.fc(x)


class Tapped(nn.Module):
    def __init__(self, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.taps = taps
        self.enter = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Any) -> Any:
        states = [self.enter(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return torch.stack([states[tap] for tap in self.taps]).square().sum()


@pytest.mark.parametrize(
    ("taps", "inexact"),
    [
        ((3,), ()),
        ((1, 3), ("blocks.1",)),  # read by the second block and by the loss
        ((1,), ()),  # the second block's output goes nowhere
        ((0, 2, 3), ("blocks.0", "blocks.2")),
    ],
)
def test_a_block_is_inexact_where_its_input_is_read_after_it_too(
    taps: tuple[int, ...], inexact: tuple[str, ...]
) -> None:
    model = Tapped(taps)
    watch = blocks.Watch(model)
    watch.follow(model(torch.ones(2, 4)))
    watch.close()
    assert watch.inexact == inexact
