"""Which updates of an optimizer reach the weights: a real step beside the same step in float32."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kbitcheck.core.facts import Update
from kbitcheck.observe import internals

LOW = (torch.float16, torch.bfloat16)
# Their steps are as small as gradients: RAdam's in the first five, before it divides by their size.
ALONG_GRADIENT = (torch.optim.SGD, torch.optim.ASGD, torch.optim.RAdam)
MOST = 0.9  # of the lost updates land at ``lands_at``


def in_float32(optimizer: Any, parameters: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """What the optimizer's next step makes of half-precision parameters in float32, by the parameter's ``id``.

    Neither the parameters nor the optimizer's state change. Parameters without a gradient are left out.
    """
    wide = {id(p): _wide(p) for p in parameters if p.dtype in LOW and p.grad is not None}
    if not wide:
        return {}
    beside = copy.copy(optimizer)
    beside.param_groups = [
        {
            **{k: copy.deepcopy(v) for k, v in group.items() if k != "params"},
            "params": [wide[id(p)] for p in group["params"] if id(p) in wide],
        }
        for group in optimizer.param_groups
    ]
    beside.state = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        if id(parameter) in wide:
            beside.state[wide[id(parameter)]] = {key: _copied(value) for key, value in state.items()}
    type(optimizer).step(beside)
    return {key: parameter.detach() for key, parameter in wide.items()}


def update(
    before: torch.Tensor, after: torch.Tensor, wide: torch.Tensor | None, *, rate: float, gradient: torch.Tensor | None
) -> Update:
    """What one step did to a tensor; ``wide`` is what the same step in float32 makes of ``before`` (None: it was not taken).

    Elements whose gradient is zero, which weight decay alone moves, do not count as wanted.
    """
    before, after = internals.local(before), internals.local(after)
    gradient = None if gradient is None else internals.local(gradient)
    moved = after != before
    facts: Mapping[str, Any] = {"wanted": int(moved.sum())}
    if wide is not None and gradient is not None:
        change = wide - before.float()
        wanted = (change != 0) & (gradient != 0)
        lost = wanted & ~moved
        facts = {"wanted": int(wanted.sum()), "lost": int(lost.sum())}
        if rate and bool(lost.any()):
            # Rounding to nearest moves an element by an update of half the distance to the next number.
            needed = (half_step(before)[lost] / change[lost].abs()).sort().values
            facts = {**facts, "lands_at": rate * float(needed[int(MOST * (len(needed) - 1))])}
    dtype = str(before.dtype).removeprefix("torch.")
    facts = {**facts, "gradient": state_of(gradient), "moved": int(moved.sum()), "rate": rate}
    return Update(dtype=dtype, elements=before.numel(), **facts)


def along_gradient(seen: Update, before: torch.Tensor, gradient: torch.Tensor | None, *, rate: float) -> Update:
    """The update of a float32 tensor that stood still, with the elements that a step along the gradient is too small to move.

    Such are the first steps of ``lora_A``, whose gradient ``lora_B`` holds down, which starts at zero.
    """
    if seen.moved or seen.gradient != "ok" or before.dtype is not torch.float32 or gradient is None:
        return seen
    change = rate * internals.local(gradient.detach()).abs()
    small = (change < half_step(internals.local(before))) & (change != 0)
    return dataclasses.replace(seen, wanted=int((change != 0).sum()), lost=int(small.sum()))


def beside_decay(
    seen: Update,
    before: torch.Tensor,
    after: torch.Tensor,
    gradient: torch.Tensor | None,
    *,
    rate: float,
    decay: float,
    epsilon: float,
) -> Update:
    """The update with the parts that the gradient, weight decay and the optimizer's epsilon have in it."""
    if seen.gradient not in ("ok", "zero") or gradient is None:
        return seen
    tensors = map(internals.local, (before, after.detach(), gradient.detach()))
    climb, along, change, square, largest, stride = _products(*tensors, decay=rate * decay)
    # Decay is taken off the weights, as AdamW does, or added to the gradient, as Adam does: what holds either way counts.
    climb = min(climb + rate * decay * along, climb + decay * change)
    return dataclasses.replace(
        seen,
        climb=climb,
        decay=rate * decay,
        shrunk=-change / square if square else 0.0,
        stride=stride,
        size=math.sqrt(square / before.numel()),
        damping=epsilon / largest if largest else 0.0,
    )


CHUNK = 2**24  # elements of which copies in float32 are made at once


def _products(before: torch.Tensor, after: torch.Tensor, gradient: torch.Tensor, *, decay: float) -> list[float]:
    """The gradient times the change and times the tensor; the tensor times the change and times itself; the largest element of the
    gradient, and of the change or the change without decay, whichever is less.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=before.device)
    largest = torch.zeros(3, dtype=torch.float32, device=before.device)
    for chunk in zip(*(each.reshape(-1).split(CHUNK) for each in (before, after, gradient)), strict=True):
        old, new, slope = (each.float() for each in chunk)
        change = new - old
        sums += torch.stack([slope @ change, slope @ old, old @ change, old @ old]).double()
        tops = [slope.abs().max(), change.abs().max(), (change + decay * old).abs().max()]
        largest = torch.maximum(largest, torch.stack(tops))
    numbers: list[float] = sums.tolist()
    steepest, farthest, undecayed = largest.tolist()
    return [*numbers, steepest, min(farthest, undecayed)]


def half_step(values: torch.Tensor) -> torch.Tensor:
    """Half the distance from each value to the next number of its dtype, in float32."""
    info = torch.finfo(values.dtype)
    _, exponent = torch.frexp(values.float())  # a mantissa from a half to one
    step = torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float32), exponent - 1)
    return step.clamp(min=info.smallest_normal * info.eps) / 2


def state_of(gradient: torch.Tensor | None) -> str:
    """A gradient in a word: ``ok``, ``zero``, ``none`` or ``not finite``."""
    if gradient is None:
        return "none"
    if not bool(torch.isfinite(gradient).all()):
        return "not finite"
    return "ok" if bool(gradient.any()) else "zero"


def _wide(parameter: torch.Tensor) -> torch.Tensor:
    wide = internals.local(parameter.detach()).float().requires_grad_(True)
    assert parameter.grad is not None
    wide.grad = internals.local(parameter.grad.detach()).float()
    return wide


def _copied(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    value = internals.local(value.detach())
    return value.float() if value.dtype in LOW else value.clone()
