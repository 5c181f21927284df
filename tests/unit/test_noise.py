"""Yardsticks that are drawn again where a tensor is further off than one of them allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from kbitcheck.core.facts import YARDSTICKS, Gap
from kbitcheck.observe.blockwise import noise
from kbitcheck.observe.blockwise.record import BlockCall

USUAL = Gap(
    norm=1.0, finite=True, size=1.0, error=0.01, yardstick=0.01, from_rounded=0.01, factor=0.001, factor_noise=0.001, bitwise=False
)  # fmt: skip


def gaps(**changed: Gap) -> Mapping[str, Gap]:
    return {**{f"usual {i}": USUAL for i in range(5)}, **changed}


def drawing(*errors: float, factor: float = 0.001) -> Any:
    """Draws whose errors are these, over and over."""
    return lambda number: {"x": dataclasses.replace(USUAL, error=errors[number % len(errors)], factor=factor)}


def no_draw(number: int) -> Mapping[str, Gap]:
    raise AssertionError("nothing is beyond its bound")


def test_what_is_within_its_bounds_is_not_drawn_again() -> None:
    usual = gaps(x=dataclasses.replace(USUAL, error=0.039, factor=-0.0079))
    assert noise.drawn_again(usual, no_draw) == usual


def test_a_yardstick_is_the_root_mean_square_of_all_draws() -> None:
    far = dataclasses.replace(USUAL, error=0.05)
    again = noise.drawn_again(gaps(x=far), drawing(0.03))
    assert again["x"].yardstick == pytest.approx(((0.01**2 + 8 * 0.03**2) / 9) ** 0.5)
    assert again["x"].error == 0.05
    assert {n: g for n, g in again.items() if n != "x"} == {n: g for n, g in gaps().items() if n != "x"}


def test_a_fault_stays_beyond_what_other_draws_allow() -> None:
    far = dataclasses.replace(USUAL, error=0.05, factor=0.05)
    again = noise.drawn_again(gaps(x=far), drawing(0.009, 0.011))
    assert noise.beyond(again) == ["x"]


def test_a_factor_has_the_noise_of_the_draws() -> None:
    far = dataclasses.replace(USUAL, factor=0.013)  # a usual one is within 8 * 0.001 / 0.6745
    assert noise.beyond(gaps(x=far)) == ["x"]
    again = noise.drawn_again(gaps(x=far), drawing(0.01, factor=-0.004))
    assert again["x"].factor_noise == pytest.approx(0.004)
    assert not noise.beyond(again)


def test_many_that_are_off_are_off_for_a_reason() -> None:
    far = gaps(**{f"x{i}": dataclasses.replace(USUAL, error=0.09) for i in range(4)})
    assert noise.drawn_again(far, no_draw) == far


def test_what_is_missing_is_missing_for_a_reason() -> None:
    missing = gaps(x=dataclasses.replace(USUAL, norm=None, error=1.0))
    assert noise.drawn_again(missing, no_draw) == missing


def test_what_no_draw_makes_is_off_for_a_reason() -> None:
    """As what enters a block, or a gradient that its twin does not have either."""
    far = gaps(x=dataclasses.replace(USUAL, error=0.05))
    assert noise.drawn_again(far, lambda number: {}) == far
    none = {"x": dataclasses.replace(USUAL, norm=None, error=1.0)}
    assert noise.drawn_again(far, lambda number: none) == far


@pytest.mark.parametrize(("draws", "often"), [(1, 0.00997), (1 + noise.DRAWS, 1.3e-7)])
def test_errors_of_four_numbers_are_beyond_so_often(draws: int, often: float) -> None:
    """Against a count of drawn errors; what is too rare to be counted is not seen once."""
    generator = torch.Generator().manual_seed(0)
    error, yardsticks = (torch.randn(200_000, n, 4, generator=generator).square().sum(-1) for n in (1, draws))
    beyond = float((error[:, 0] > YARDSTICKS**2 * yardsticks.mean(dim=1)).double().mean())
    assert beyond == pytest.approx(often, abs=4 * (often / 200_000) ** 0.5)


def test_a_moved_call_differs_by_rounding_and_the_recorded_one_stays() -> None:
    hidden, mask = torch.randn(2, 8, 16, dtype=torch.bfloat16), torch.full((2, 1, 8, 8), -3e38)
    entering = {0: torch.randn(2, 8, 16)}
    nothing: Any = None
    call = BlockCall(
        block="b", leaves=[hidden, mask, 3], names=["hidden", "mask", "n"], structure=nothing, differentiable=(0,), device="cpu",
        autocast=None, entering=entering,
    )  # fmt: skip
    before = hidden.clone()
    moved = noise.moved(call, [torch.bfloat16], 1)
    assert torch.equal(hidden, before)
    assert moved.leaves[1] is mask
    off = ((moved.leaves[0] - hidden).float() / hidden.float()).abs()
    assert 0 < float(off.max()) <= 2 * torch.finfo(torch.bfloat16).eps
    relative = ((moved.entering[0] - entering[0]) / entering[0]).abs()
    assert 0.4 * torch.finfo(torch.bfloat16).eps < float(relative.max()) <= 0.51 * torch.finfo(torch.bfloat16).eps
    assert not torch.equal(noise.moved(call, [], 2).leaves[0], moved.leaves[0])
