"""Whose it is that two modes of checkpointing give different gradients, when a slope says nothing, and what was not judged."""

from __future__ import annotations

import dataclasses
import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Distance, Gap, LayerBackward, TrainingFacts
from kbitcheck.core.result import Party
from kbitcheck.judge.gradients import live_gradients, loss_falls, reentrant_agrees
from kbitcheck.judge.layers import layer_backward_exact

SAME = {"lora_A": Distance(equal=True, relative=0.0, yardstick=0.0)}
CUT = {"lora_A": Distance(equal=False, relative=math.inf, yardstick=0.0)}


def case(plain: Any, other: Any, bare: Any = None) -> Any:
    return SimpleNamespace(
        checkpointing="default",
        run=SimpleNamespace(checkpoints=({"use_reentrant": "False"},)),
        plain_run=SimpleNamespace(inexact=()),
        base=SimpleNamespace(parameters={}, supports_checkpointing=True),
        other_mode_raised=None,
        against_plain=plain,
        against_other_mode=other,
        unprepared=bare,
    )


@pytest.mark.parametrize(
    ("plain", "base", "party"),
    [
        (SAME, CUT, Party.MODEL),  # the base bears the other mode no better
        (SAME, SAME, Party.IMPLEMENTATION),  # the base bears both
        (CUT, CUT, Party.MODEL),  # that its own mode is wrong is KB305's to tell
    ],
)
def test_the_other_mode_is_the_models_where_the_base_fails_too(
    monkeypatch: pytest.MonkeyPatch, plain: Any, base: Any, party: Party
) -> None:
    monkeypatch.setattr("kbitcheck.judge.gradients.needs_checkpointing", lambda facts: None)
    (told,) = reentrant_agrees(case(plain, CUT, case(SAME, base)))
    assert not told.ok
    assert told.party is party


def along(predicted: float, slope: float, **weights: tuple[str, bool]) -> Any:
    """Facts of a step that has a slope; by name, the dtype of a weight and whether it trains."""
    losses = (2.5, 2.5 + predicted * slope)
    training = TrainingFacts(losses=losses, predicted=(0.0, predicted), slope=slope, uncertainty=0.001)
    held = {
        name: SimpleNamespace(dtype=dtype, adapter=own, requires_grad=own) for name, (dtype, own) in weights.items()
    }
    return SimpleNamespace(
        training=training, compute_ulp=2**-23, base=SimpleNamespace(layers={}), wrapped=SimpleNamespace(parameters=held),
        gradients={"lora_A": LIVE},
    )  # fmt: skip


@pytest.mark.parametrize(("predicted", "slope", "judged"), [(-1e-3, 0.1, False), (-0.1, 0.1, True), (-1e-3, 1.0, True)])
@pytest.mark.parametrize("half", ["kernel", "norm"])
def test_a_step_that_is_rounded_away_says_nothing_of_a_slope(
    half: str, predicted: float, slope: float, judged: bool
) -> None:
    """Of a loss of 2.5 half an ulp of bfloat16 is 0.01: what moves less stays on one flat of a staircase."""
    facts = along(predicted, slope, norm=("bfloat16" if half == "norm" else "float32", False))
    facts.compute_ulp = 2**-7 if half == "kernel" else 2**-23
    check = inspect.unwrap(loss_falls)
    if judged:
        (observation,) = check(facts)
        assert observation.ok is (slope == 1.0)
    else:
        with pytest.raises(NotApplicable, match="rounded away"):
            list(check(facts))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_updates_that_half_precision_rounds_away_are_no_missing_gradient(dtype: str | None) -> None:
    facts = along(0.0, 0.0, **({} if dtype is None else {"lora_A": (dtype, True)}))
    check = inspect.unwrap(loss_falls)
    if dtype == "bfloat16":
        with pytest.raises(NotApplicable, match="rounds every update away"):
            list(check(facts))
    else:
        (observation,) = check(facts)
        assert not observation.ok


LIVE = Gap(
    norm=1.0, finite=True, size=1.0, error=0.0, yardstick=0.0, from_rounded=0.0, factor=0.0, factor_noise=0.0, bitwise=True
)  # fmt: skip


@pytest.mark.parametrize(("size", "live"), [(1e-17, False), (1e-8, True)], ids=["rounding in float64", "underflow"])
def test_a_gradient_that_is_zero_in_the_twin_in_the_same_dtypes_is_judged_by_its_size_in_float64(
    size: float, live: bool
) -> None:
    zero = dataclasses.replace(LIVE, norm=0.0, size=size, error=1.0, yardstick=1.0)
    facts: Any = SimpleNamespace(gradients={"mlp": LIVE, "q": zero})
    assert ("q" in live_gradients(facts)) is live


@pytest.mark.parametrize("others", [0, 1])
def test_experts_that_could_not_be_judged_are_named_and_are_no_verdict_by_themselves(others: int) -> None:
    unjudged = LayerBackward(reached=True, carried=True, unjudged="its code does not run in float64: RuntimeError: no")
    judged = {f"layer {n}": LayerBackward(reached=True, carried=True, gain_bound=1e-3) for n in range(others)}
    facts: Any = SimpleNamespace(
        gradients={"layer 0.lora_A": LIVE},
        layer_backwards={"mlp.experts (experts)": unjudged, **judged},
        mixed_backwards={},
    )
    check = inspect.unwrap(layer_backward_exact)
    if others:
        told = list(check(facts))
        assert all(observation.ok for observation in told)
        note = "mlp.experts (experts) was not judged: its code does not run in float64: RuntimeError: no"
        assert [observation.note for observation in told] == [note, ""]
    else:
        with pytest.raises(NotApplicable, match="does not run in float64"):
            list(check(facts))


def test_layers_none_of_which_ran_are_not_judged() -> None:
    """As those of adapters that compute with a layer's weight themselves."""
    facts: Any = SimpleNamespace(gradients={"layer 0.hra_u": LIVE}, layer_backwards={}, mixed_backwards={})
    with pytest.raises(NotApplicable, match="no quantized layer ran"):
        list(inspect.unwrap(layer_backward_exact)(facts))
