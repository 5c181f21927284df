"""The loss along an optimizer step, beside what the gradient says."""

from types import SimpleNamespace

import pytest
import torch

from kbitcheck.core.facts import CERTAIN
from kbitcheck.observe.probes.descent import LEARNING_RATES, WEIGHT_DECAY, descend

BATCH = {"input_ids": torch.linspace(-1, 1, 24).reshape(4, 6)}


class Model(torch.nn.Module):
    """A regression whose loss may be scaled or rounded."""

    def __init__(self, scale=1.0, dtype=torch.float64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-2, 2, 6, dtype=torch.float64))
        self.scale, self.dtype, self.first = scale, dtype, 0.0

    def forward(self, input_ids):
        loss = ((input_ids.double() @ self.weight) ** 2).mean()
        if not torch.is_grad_enabled():
            loss = loss * self.scale + (1 - self.scale) * self.first
        else:
            self.first = loss.detach()
        return SimpleNamespace(loss=loss.to(self.dtype))


def test_a_parabola_falls_as_its_gradient_says():
    model = Model()
    way = descend(model, BATCH, seed=0)
    assert way.slope == pytest.approx(1, abs=1e-6)
    assert way.uncertainty < 1e-6
    assert way.predicted[0] == 0 > way.predicted[-1]
    assert way.losses[0] > way.losses[-1]
    assert model.weight.grad is None


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_a_loss_that_follows_another_gradient_has_another_slope(scale):
    assert descend(Model(scale), BATCH, seed=0).slope == pytest.approx(scale, abs=1e-6)


class Flattening(Model):
    """A loss that is ``steep`` where training starts and flat where any step leads."""

    def __init__(self, steep):
        super().__init__()
        self.steep, self.start = steep, None

    def forward(self, input_ids):
        square = ((input_ids.double() @ self.weight) ** 2).mean()
        self.start = square.detach() if self.start is None else self.start
        away = self.steep * (square - self.start)
        return SimpleNamespace(loss=5 + away / (1 + away.abs()))


@pytest.mark.parametrize("steep", [1e3, 1e5, 1e6])
def test_a_loss_that_is_flat_behind_every_step_follows_no_other_gradient(steep):
    way = descend(Flattening(steep), BATCH, seed=0)
    assert way.agrees
    assert way.is_certain == (steep < 1e5)


def test_a_rounded_loss_is_uncertain():
    """Rounding that is larger than the change of the loss leaves nothing to conclude from."""
    fine, coarse = (descend(Model(dtype=dtype), BATCH, seed=0) for dtype in (torch.float32, torch.bfloat16))
    assert fine.uncertainty <= CERTAIN < coarse.uncertainty
    assert abs(fine.slope - 1) <= 6 * fine.uncertainty


def test_where_nothing_has_a_gradient_nothing_is_predicted():
    model = Model()

    def freeze(module, args):
        module.weight.requires_grad_(False)

    model.register_forward_pre_hook(freeze)
    before = model.weight.detach().clone()
    way = descend(model, BATCH, seed=0)
    assert set(way.predicted) == {0.0}
    assert torch.equal(model.weight, before)


def test_the_model_is_left_after_two_steps():
    model = Model()
    before = model.weight.detach().clone()
    descend(model, BATCH, seed=0)
    moved = (model.weight - before).abs().max()
    assert LEARNING_RATES[0] < moved <= 2 * LEARNING_RATES[0] * (1 + WEIGHT_DECAY * before.abs().max())


def test_in_half_precision_what_has_a_gradient_moves():
    """However small the learning rate that the loss asks for: half precision would round the update away."""

    class Half(Model):
        def __init__(self):
            super().__init__()
            self.low = torch.nn.Parameter(torch.full((6,), 0.7, dtype=torch.bfloat16))
            self.unread = torch.nn.Parameter(torch.full((6,), 0.7, dtype=torch.bfloat16))

        def forward(self, input_ids):
            out = super().forward(input_ids)
            return SimpleNamespace(loss=out.loss + 1e-6 * self.low.double().sum())

    model = Half()
    descend(model, BATCH, seed=0)
    assert bool((model.low < 0.7 - 2**-9).all())
    assert bool((model.unread == torch.tensor(0.7, dtype=torch.bfloat16)).all())
