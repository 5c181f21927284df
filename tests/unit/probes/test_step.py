"""What two steps are compared by."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.backends.protocol import Arithmetic, Recognition
from kbitcheck.observe.probes import layers, step
from kbitcheck.observe.store import round_trip

ZERO, ONE = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (None, None, True),
        (None, ZERO, True),  # what the loss does not hang on gets either, as checkpointing has it
        (ZERO, None, True),
        (None, ONE, False),
        (ONE, None, False),
        (ONE, ONE.clone(), True),
        (ONE, ONE.double(), False),
    ],
)
def test_a_missing_gradient_is_zero_and_nothing_else(a: Any, b: Any, same: bool) -> None:
    assert step.equal(a, b) is same
    if a is None or b is None:
        assert step.distance(a, b) == (0.0 if same else math.inf)


@pytest.fixture
def neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain layer passes for one of a backend that fills in nothing."""
    monkeypatch.setattr(backends, "recognition", lambda layer: Recognition())
    monkeypatch.setattr(backends, "arithmetic", lambda layer: Arithmetic())


@pytest.mark.usefixtures("neutral")
@pytest.mark.parametrize(("off", "right"), [(0.0, True), (1e-36, False)])
def test_gradients_that_die_out_may_vanish(off: float, right: bool) -> None:
    """In a layer that computes in the dtype of its input."""
    tiny = torch.finfo(torch.bfloat16).tiny
    weight = torch.full((32, 4), 0.5, dtype=torch.float64)
    dy = torch.full((1, 32), 1.5 * tiny)  # each product is below the smallest normal number: a kernel may drop them all
    probe = layers._Probe(nn.Linear(4, 32), lambda: weight, torch.bfloat16)
    probe.dtype = torch.float32
    probe._enters(dy)
    probe._leaves(torch.full((1, 4), off))
    assert (probe.result(misread=0.0).excess <= 1) is right


@pytest.mark.usefixtures("neutral")
def test_a_gradient_that_leaves_before_one_entered_is_not_the_layers() -> None:
    probe = layers._Probe(nn.Linear(4, 32), lambda: torch.zeros(32, 4).double(), None)
    probe._leaves(torch.ones(1, 4))
    probe._enters(torch.ones(1, 32))
    assert not probe.result(misread=0.0).carried


@pytest.mark.usefixtures("neutral")
@pytest.mark.parametrize("reached", [True, False])
def test_a_step_that_is_recorded_has_a_graph_of_its_own(reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose layers are judged by another step where a gradient does not reach their inputs."""
    layer = nn.Linear(4, 32).requires_grad_(False)
    monkeypatch.setattr(backends, "quantized_layers", lambda model: [("", model)])
    monkeypatch.setattr(backends, "recognition", lambda each: SimpleNamespace(shape=lambda each: (32, 4)))
    weights: Any = SimpleNamespace(layers={"": layer}, owners={}, misread={}, exact=lambda name: layer.weight.double())
    x = torch.ones(1, 4, requires_grad=reached)
    with layers.Probes(layer, weights, leave=True) as probes:
        y = layer(x)
        assert y.requires_grad is reached
        if reached:
            y.sum().backward()
    assert probes.complete is reached
    assert [each.excess <= 1 for each in probes.results().values() if each.reached] == [True] * reached


class Noisy(nn.Module):
    """Draws noise in every forward, and saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=x * self.weight + torch.randn(2))

    def save_pretrained(self, folder: str) -> None:
        pass


def test_noise_that_a_model_draws_is_no_difference_after_reloading() -> None:
    preparation: Any = SimpleNamespace(
        prepared_copy=Noisy, apply=lambda model: model, attach=lambda model: (model, {"weight": model.weight}),
        autocast=nullcontext, batch={"x": torch.ones(1, 2)}, spec=SimpleNamespace(device="cpu"),
        loaded=SimpleNamespace(
            reload=lambda folder, device: Noisy(), state_keys=frozenset(Noisy().state_dict())
        ),
    )  # fmt: skip
    facts = round_trip(preparation)
    assert facts.logits is not None
    assert facts.logits.equal
