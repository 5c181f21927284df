"""The yardstick of a tensor that is further off than its bound, drawn again: rounding moves a tensor of few numbers little by chance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from kbitcheck.core.facts import FLOAT32_ULP, YARDSTICKS, Gap, median_yardstick
from kbitcheck.core.facts.blockwise import deviation, factor_bound
from kbitcheck.observe.blockwise.record import BlockCall, floating

# An error of four numbers is beyond four yardsticks of one draw once in 100 tensors (the F distribution of 4 and 4 degrees of
# freedom, beyond 16), and beyond those of nine once in seven million (4 and 36).
DRAWS = 8
# Of twenty tensors of a block, each beyond by chance once in 100, more than three are once in 20,000 blocks (binomial).
BY_CHANCE = 3


def beyond(gaps: Mapping[str, Gap]) -> list[str]:
    """What is further from a twin than rounding takes it, by its own yardsticks and those of the others."""
    least, apart = max(median_yardstick(gaps.values()), FLOAT32_ULP), deviation(gaps.values())
    return [
        name
        for name, gap in gaps.items()
        if gap.live
        and not gap.bitwise
        and (gap.error > YARDSTICKS * max(gap.yardstick, least) or abs(gap.factor) > factor_bound(gap, apart))
    ]


def drawn_again(gaps: Mapping[str, Gap], draw: Callable[[int], Mapping[str, Gap]]) -> dict[str, Gap]:
    """The gaps, those beyond their bounds with yardsticks of several draws, if chance may explain all of them.

    ``draw`` gives, by name, those of a twin that rounds otherwise: of what a block makes, and not of what enters it.
    """
    names = beyond(gaps)
    if not names or len(names) > BY_CHANCE or any(gaps[name].norm is None for name in names):
        return dict(gaps)
    draws = [draw(number) for number in range(DRAWS)]
    if any(name not in each or each[name].norm is None for each in draws for name in names):
        return dict(gaps)
    return {**gaps, **{name: _pooled(gaps[name], [each[name] for each in draws]) for name in names}}


def _pooled(gap: Gap, draws: Sequence[Gap]) -> Gap:
    yardstick = _root_mean_square([gap.yardstick, *(each.error for each in draws)])
    factor_noise = _root_mean_square([each.factor for each in draws])
    return dataclasses.replace(
        gap, yardstick=max(gap.yardstick, yardstick), factor_noise=max(gap.factor_noise, factor_noise)
    )


def _root_mean_square(numbers: Sequence[float]) -> float:
    finite = [each for each in numbers if math.isfinite(each)]
    return math.sqrt(sum(each * each for each in finite) / len(finite)) if finite else 0.0


def moved(call: BlockCall, dtypes: Sequence[torch.dtype], number: int) -> BlockCall:
    """The call with inputs and gradients that are rounded otherwise, by the coarsest of ``dtypes`` and their own."""
    generator = torch.Generator(device=call.device).manual_seed(number)
    coarse = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    def other(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32) - 0.5
        wide = tensor.detach().double()
        return (wide * (1 + max(coarse, torch.finfo(tensor.dtype).eps) * noise)).to(tensor.dtype)

    leaves = [other(leaf) if i in _moving(call) and floating(leaf) else leaf for i, leaf in enumerate(call.leaves)]
    entering = {i: other(gradient) for i, gradient in call.entering.items()}
    return dataclasses.replace(call, leaves=leaves, entering=entering)


def _moving(call: BlockCall) -> frozenset[int]:
    """What carries numbers of the model; a mask does not, whose least number would leave its dtype."""
    return frozenset(call.differentiable) or frozenset(_first(call))


def _first(call: BlockCall) -> Iterator[int]:
    return (i for i, leaf in enumerate(call.leaves[:1]) if floating(leaf))
