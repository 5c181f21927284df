"""A tap sees the gradient, and lets other code do with a tensor what it does without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kbitcheck.observe.probes.tap import Tap


def test_what_is_tapped_may_be_changed_in_place() -> None:
    layer, x, caught = nn.Linear(3, 3), torch.randn(2, 3), list[Tensor]()
    gradients: list[Tensor] = []
    for tap in (lambda y: y, lambda y: Tap.apply(y, caught.append)):
        leaf = x.clone().requires_grad_(True)
        output = tap(layer(leaf))
        output += leaf * 2  # as AdaLoRA adds its product
        output.square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert torch.equal(caught[0], 2 * (layer(x) + 2 * x))
