"""Some tokens of a head that is too large for a twin that is kept: what it makes of them, beside the same in float64."""

from __future__ import annotations

import dataclasses
import random
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.errors import cause
from kbitcheck.core.facts import Part
from kbitcheck.observe.blockwise.oracle import Twin, compare_alone
from kbitcheck.observe.blockwise.record import outermost_blocks
from kbitcheck.observe.watch.blocks import SMALL, Recorder
from kbitcheck.observe.watch.guard import Guard

TOKENS = 16
CHUNK = 2**22  # weights of which a copy in float64 is made at once


def large_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of more weights than a kept twin may have that are in no block and are not quantized."""
    blocks = tuple(f"{name}." for name in outermost_blocks(model))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and not name.startswith(blocks)
        and 8 * sum(p.numel() for p in module.parameters()) >= SMALL
        and not backends.is_packed(module.weight)
        and module.weight.device.type != "meta"
    }


class Tokens:
    """Draws the tokens of a batch that are looked at, anew for each recorder."""

    def __init__(self, draws: random.Random) -> None:
        self._draws = draws
        self._drawn: torch.Tensor | None = None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the drawn tokens in a copy; the last dimension is a token's."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        if self._drawn is None:
            drawn = self._draws.sample(range(len(rows)), min(TOKENS, len(rows)))
            self._drawn = torch.tensor(sorted(drawn), device=tensor.device)
        return rows[self._drawn]


def recorder_of(name: str, head: nn.Linear, guard: Guard, draws: random.Random) -> Recorder:
    """A recorder that keeps some tokens of what the head returns."""
    return Recorder(name, head, guard, Tokens(draws))


def compared(recorder: Recorder) -> Part | str:
    """The recorded tokens beside a product in float64, and one in the head's own dtypes; or why they cannot be compared."""
    recorded, head = recorder.recorded, recorder.block
    if recorder.why or recorded is None:
        return recorder.why
    call = dataclasses.replace(recorded.call, differentiable=recorded.own, entering=recorded.entering)
    call.leaves = [recorder.part(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in call.leaves]
    call.leaving = {index: recorder.part(gradient) for index, gradient in call.leaving.items()}
    twins = (
        Twin(model=_Head(head, exact=True), adapters={}, dtype=torch.float64),
        Twin(model=_Head(head, exact=False), adapters={}),
    )
    try:
        part, _ = compare_alone(call, {}, twins, lambda twin: nullcontext())
    except Exception as error:
        return f"a twin of the head raised {cause(error)}"
    return dataclasses.replace(part, kind=type(head).__name__, sampled=True)


class _Head(nn.Module):
    """What a linear layer computes, in float64 or in its own dtypes, with its weights as they are."""

    def __init__(self, head: Any, *, exact: bool) -> None:
        super().__init__()
        self._weights = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self._exact = exact

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weights
        if not self._exact:
            return nn.functional.linear(x, weight, bias)
        product: torch.Tensor = _Product.apply(x, weight)
        return product if bias is None else product + bias.double()


class _Product(torch.autograd.Function):
    """A product with a weight, of which a part is in float64 at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.cat([x @ part.double().T for part in _parts(weight)], dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        parts = _parts(weight)
        pieces = gradient.split([len(part) for part in parts], dim=-1)
        return sum(piece @ part.double() for piece, part in zip(pieces, parts, strict=True)), None


def _parts(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = weight.split(max(1, CHUNK // weight.shape[1]))
    return parts
