"""KB303 through stacks of experts: each token's gradient beside that of the module's float64 twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training
from torch import nn
from torch.utils.checkpoint import checkpoint

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.facts import LayerBackward
from kbitcheck.observe.probes.experts import _excess
from kbitcheck.observe.probes.layers import Weights, backwards
from kbitcheck.sabotage.experts import Reads, stacks
from kbitcheck.sabotage.helpers import subclass
from tests.shallow import shallow

NAME = "model.layers.{}.mlp.experts (experts)"


Damage = Callable[[Any], None]


def nothing(model: Any) -> None:
    """Leave the model as it is."""


def measured(damage: Damage = nothing, quant: str = "nf4", every: Damage = nothing) -> list[LayerBackward]:
    """The backward of the experts of both blocks; ``damage`` is done to the model, ``every`` to its pristine copy too."""
    source = shallow("tiny:gpt-oss")
    model: Any = source.load(Quantization.parse(f"{quant},experts=parametrize"))
    pristine = source.load(Quantization.parse(f"{quant},experts=parametrize"))
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    damage(model)
    every(model)
    every(pristine)
    results = backwards(model, source.batch(model), Weights(pristine))
    return [results[NAME.format(block)] for block in range(2)]


def owner(model: Any) -> nn.Module:
    module: nn.Module = model.model.layers[0].mlp.experts
    return module


@pytest.mark.parametrize("quant", ["nf4", "fp4,double"])
def test_a_good_model_differs_from_the_float64_twin_as_its_own_dtypes_do(quant: str) -> None:
    # The same operations on the same numbers: one of the four yardsticks that are allowed, or none where nothing is rounded.
    assert [0 < seen.excess <= 0.25 for seen in measured(quant=quant)] == [True, True]


def scaled(part: float) -> Damage:
    """One expert's gradient times 1 - part; its output stays."""

    def forward(self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        run = super(type(self), self).forward
        own = (chosen == 0).to(weights.dtype)
        rest: torch.Tensor = run(hidden, chosen, weights * (1 - own))
        mixed: torch.Tensor = run(hidden.detach() * part + hidden * (1 - part), chosen, weights * own)
        return rest + mixed

    return lambda model: subclass(owner(model), forward=forward)


@pytest.mark.parametrize("part", [1.0, 0.01])
def test_one_experts_gradient_that_is_lost_or_short_by_a_hundredth_is_seen(part: float) -> None:
    broken, whole = measured(scaled(part))
    assert broken.excess > 1
    assert whole.excess <= 0.25


def test_a_transposed_expert_is_seen() -> None:
    def transpose(weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([weights[:1].transpose(1, 2), weights[1:]])

    broken, whole = measured(lambda model: stacks(model, "down_proj")[0].append(Reads(transpose)))
    assert broken.excess > 1
    assert whole.excess <= 0.25


def test_a_module_that_cuts_its_input_off_carries_no_gradient() -> None:
    def forward(self: Any, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super(type(self), self).forward(hidden.detach(), *rest)
        return out

    broken, whole = measured(lambda model: subclass(owner(model), forward=forward))
    assert (broken.carried, whole.carried) == (False, True)


def in_halves(model: Any) -> None:
    """The first block's experts run twice, on half of the tokens each."""

    def forward(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        _, scores, chosen = self.router(tokens)
        halves = zip(tokens.chunk(2), chosen.chunk(2), scores.chunk(2), strict=True)
        return torch.cat([self.experts(*half) for half in halves]).reshape(hidden.shape), scores

    subclass(model.model.layers[0].mlp, forward=forward)


def test_experts_that_run_more_than_once_are_judged_call_by_call() -> None:
    assert [0 < seen.excess <= 0.25 for seen in measured(in_halves)] == [True, True]

    def damage(model: Any) -> None:
        in_halves(model)
        scaled(0.01)(model)

    broken, whole = measured(damage)
    assert broken.excess > 1
    assert whole.excess <= 0.25


def test_a_recompute_whose_graph_is_thrown_away_is_no_lost_gradient() -> None:
    def around(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        run = mlp.forward
        mlp.forward = lambda hidden: checkpoint(run, hidden, use_reentrant=False)

    assert [0 < seen.excess <= 0.25 for seen in measured(around)] == [True, True]

    def damage(model: Any) -> None:
        scaled(1.0)(model)
        around(model)

    broken, _ = measured(damage)
    assert broken.excess > 1


def test_experts_whose_code_knows_no_float64_are_named_with_the_reason() -> None:
    def forward(self: Any, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if hidden.dtype is torch.float64:
            raise RuntimeError("this kernel takes half precision alone")
        out: torch.Tensor = super(type(self), self).forward(hidden, *rest)
        return out

    unjudged, whole = measured(every=lambda model: subclass(owner(model), forward=forward))
    assert unjudged.unjudged == "its code does not run in float64: RuntimeError: this kernel takes half precision alone"
    assert not whole.unjudged


def test_a_number_that_is_none_is_off_and_nothing_is_right_on_no_tokens() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert _excess(torch.full((2, 3), math.nan), exact, exact.float(), 1e-7) == math.inf
    assert _excess(torch.ones(2, 3), exact, exact.float(), 1e-7) == 0
    assert _excess(torch.ones(0, 3), exact[:0], exact[:0].float(), 1e-7) == 0
    off = exact.float() + 1e-7 * torch.eye(2, 3) * 8 * math.sqrt(3)
    assert _excess(off, exact, exact.float(), 1e-7) > 1
