"""How the loss changes along one optimizer step, and how the gradient says that it does."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from kbitcheck.core.facts import CERTAIN, WIDEST, slope_bound
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.choices import ImposeChoices, RecordChoices

LEARNING_RATES = (1.5e-3, 5e-3, 5e-4, 1.5e-4, 5e-5, 5e-6)  # in the order in which they are tried
WEIGHT_DECAY = 0.1
# Adam moves every parameter by about its learning rate, however small the gradient: a large epsilon keeps those whose
# gradient is rounding noise from walking at random.
EPSILON = 1e-3
PLACES = 4  # on the way of the first step
MORE_PLACES = 16  # before a slope is called another than the gradient's
BENT = 1 / 3  # the loss at the end of a step is farther than this from what the gradient predicts


@dataclass(frozen=True, slots=True)
class Descent:
    """One optimizer step: by place on its way, the loss, and the change of the loss that the gradient predicts.

    ``losses`` begins before the step, ``predicted`` with zero. The loss changes by ``slope`` times the prediction, plus a
    second-order term; ``uncertainty`` is that of the slope, from rounding and from terms of higher order. ``rate`` is the
    learning rate of the step.
    """

    losses: tuple[float, ...]
    predicted: tuple[float, ...]
    slope: float
    uncertainty: float
    rate: float

    @property
    def agrees(self) -> bool:
        """Whether the loss changes as the gradient says."""
        return abs(self.slope - 1) <= slope_bound(self.uncertainty)

    @property
    def is_certain(self) -> bool:
        """Whether the slope is certain enough for anything to follow."""
        return slope_bound(self.uncertainty) <= WIDEST


def descend(model: nn.Module, batch: step.Batch, *, seed: int, autocast: step.Autocast = nullcontext) -> Descent:
    """Take two AdamW steps with weight decay on one batch, and measure the loss on the way of the first; then ``move_halves``.

    The learning rate is the first that leaves the slope no more uncertain than ``CERTAIN``, or that which leaves it least
    uncertain: at a larger one the loss is no parabola, at a smaller one its change is rounding. Rates whose step ends far from
    what the gradient predicts come last: one forward tells, and tells of all larger rates, unless the loss stands still, as where half
    activations round a short step away. A step along which it predicts that the
    loss falls by more than all of it is too long, whatever the gradient: only the least rate may be so.
    """
    with switches.seeded(seed, batch), switches.dropout(model, 0.0):
        way = _Way(model, batch, seed, autocast)
        way.begin()
        descents: dict[float, Descent] = {}
        straight = math.inf  # the least rate whose step is too bent
        for rate, bent in (*product(LEARNING_RATES, (False,)), *product(LEARNING_RATES, (True,))):
            if rate in descents or (rate > straight and not bent):
                continue
            measured = way.descent(rate, bent=bent)
            if measured is None:
                straight = rate if way.moved else straight
            else:
                descents[rate] = measured
                if measured.uncertainty <= CERTAIN:
                    break
        best = min(descents, key=lambda rate: descents[rate].uncertainty)
        descent = descents[best]
        if not descent.agrees:
            # A few places may lie on a parabola by chance, and a sharp bend before the first is seen by a shorter step alone.
            shorter = way.shorter(best)
            descent = way.measured(best, MORE_PLACES)
            descent = shorter if shorter.agrees else descent
        else:
            way.go(best)
        way.backward()
        way.update(best)
        way.move_halves()
        step.clear_gradients(model)
    return descent


def take_two_steps(
    attached: Attached,
    batch: step.Batch,
    first: step.Gradients,
    rate: float,
    *,
    seed: int,
    autocast: step.Autocast = nullcontext,
) -> None:
    """Take the two steps of ``descend`` and ``move_halves``; the adapters' gradients in the first one are given."""
    model, adapters = attached
    step.clear_gradients(model)
    for name, adapter in adapters.items():
        adapter.grad = first[name]
    with switches.seeded(seed, batch), switches.dropout(model, 0.0):
        way = _Way(model, batch, seed, autocast)
        way.update(rate)
        way.backward()
        way.update(rate)
        way.move_halves()
        step.clear_gradients(model)


class _Place(NamedTuple):
    """The loss at one place of a way, its change since the start, and the change that the gradient predicts."""

    loss: float
    change: float
    predicted: float


class _Way:
    """From where the parameters have gradients to where an update leaves them."""

    def __init__(self, model: nn.Module, batch: step.Batch, seed: int, autocast: step.Autocast) -> None:
        self._model, self._batch, self._seed, self._autocast = model, batch, seed, autocast
        model.train()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.moved = True  # the loss, in the last step that was tried

    def begin(self) -> None:
        """Measure the loss and its gradients where the parameters are."""
        recorded = RecordChoices()
        self._before = self.backward(recorded)
        self._choices = recorded.indices
        self._start = self._copies()

    def _copies(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self._trained]

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self._trained, values, strict=True):
            parameter.copy_(value)

    def go(self, rate: float) -> None:
        """Take the update of a learning rate from the start."""
        self._put(self._start)
        self.update(rate)

    def update(self, rate: float) -> None:
        if self._trained:
            torch.optim.AdamW(self._trained, lr=rate, weight_decay=WEIGHT_DECAY, eps=EPSILON).step()

    def move_halves(self) -> None:
        """Move parameters in half precision, which may have rounded the updates away, as far as no rounding hides."""
        halves = [p for p in self._trained if p.dtype in (torch.float16, torch.bfloat16)]
        if halves:
            torch.optim.AdamW(halves, lr=max(LEARNING_RATES), weight_decay=0.0).step()

    def _loss(self, choices: AbstractContextManager[Any]) -> torch.Tensor:
        torch.manual_seed(self._seed)
        with choices, self._autocast():
            loss: torch.Tensor = self._model(**step.feed(self._model, self._batch)).loss
        return loss

    def backward(self, choices: RecordChoices | None = None) -> torch.Tensor:
        """The loss; its gradients are left on the parameters."""
        step.clear_gradients(self._model)
        loss = self._loss(choices or nullcontext())
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def descent(self, rate: float, *, bent: bool) -> Descent | None:
        """The descent by the update of a learning rate, after which the parameters are left.

        None where it must not be ``bent`` and is, where the update is rounded away, or where it is too long.
        """
        self.go(rate)
        end = self._here()
        self.moved = end.change != 0
        if rate > min(LEARNING_RATES) and abs(end.predicted) > abs(float(self._before)):
            return None
        if not bent and (not end.predicted or abs(end.change - end.predicted) > BENT * abs(end.predicted)):
            return None
        return self._descent(rate, PLACES, end)

    def measured(self, rate: float, places: int) -> Descent:
        """The descent by the update of a learning rate, after which the parameters are left."""
        self.go(rate)
        return self._descent(rate, places, self._here())

    def shorter(self, rate: float) -> Descent:
        """A descent by less than the learning rate: by a tenth, or by a third where rounding hides that one."""
        shortest = self.measured(rate / 10, MORE_PLACES)
        if shortest.is_certain:
            return shortest
        longer = self.measured(rate / 3, MORE_PLACES)
        return longer if longer.is_certain else shortest

    @torch.no_grad()
    def _here(self) -> _Place:
        """Where the parameters are."""
        pairs = zip(self._trained, self._start, strict=True)
        predicted = sum(float((p.grad.double() * (p - a.double())).sum()) for p, a in pairs if p.grad is not None)
        # By the experts of the start: with others the loss jumps.
        loss = float(self._loss(ImposeChoices(self._choices)))
        return _Place(loss, loss - float(self._before), predicted)

    @torch.no_grad()
    def _descent(self, rate: float, places: int, last: _Place) -> Descent:
        end = self._copies()
        way = []
        for place in range(1, places):
            between = zip(self._start, end, strict=True)
            self._put([torch.lerp(a.double(), b.double(), place / places) for a, b in between])
            way.append(self._here())
        self._put(end)
        losses = [float(self._before), *(place.loss for place in (*way, last))]
        predicted = [0.0, *(place.predicted for place in (*way, last))]
        rounding = torch.finfo(self._before.dtype).eps * abs(losses[0])
        return Descent(tuple(losses), tuple(predicted), *_slope(losses, predicted, rounding), rate)


def _slope(losses: Sequence[float], predicted: Sequence[float], rounding: float) -> tuple[float, float]:
    """Slope of the change of the loss over the prediction, with its standard error, from the parabola of least squares.

    Where a cubic has another slope, the loss is no parabola, and the slope is as uncertain as the two are apart.
    """
    x = torch.tensor(predicted[1:], dtype=torch.float64)
    y = torch.tensor(losses[1:], dtype=torch.float64) - losses[0]
    scale = float(x.abs().max())
    if not scale or not bool(torch.isfinite(y).all()):
        return 0.0, 0.0
    powers = torch.stack([(x / scale) ** n for n in (1, 2, 3)], dim=1)
    parabola, cubic = (torch.linalg.pinv(powers[:, :n]) @ y for n in (2, 3))
    terms = powers[:, :2]
    residual = math.hypot(float((y - terms @ parabola).norm()) / (len(x) - 2) ** 0.5, rounding)
    error = residual * float(torch.linalg.pinv(terms.T @ terms)[0, 0]) ** 0.5
    return float(parabola[0]) / scale, max(error, float((parabola - cubic[:2])[0].abs())) / scale
