"""Routers of experts: rounding can move their choices, and with them a whole token's logits."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from kbitcheck.observe.probes.live import tensors

T = TypeVar("T")

ROUTER = re.compile(r"(router|topk|gate)$|router", re.IGNORECASE)


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that choose experts: by class, or a linear named ``gate`` beside experts."""
    modules = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        beside_experts = hasattr(model.get_submodule(parent), "experts") if name else False
        if ROUTER.search(type(module).__name__) or (beside_experts and last in ("gate", "router")):
            modules[name] = module
    return modules


class Routed(NamedTuple):
    """Logits, and the choices of each router that ran for them, as sets of experts by token."""

    logits: torch.Tensor
    routes: list[torch.Tensor]


def routed(model: nn.Module, run: Callable[[], T]) -> tuple[T, list[torch.Tensor]]:
    """What something gives, and the choices of the model's routers meanwhile."""
    chosen: list[torch.Tensor] = []
    k = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 2

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # Detached: what a checkpointed block saves for its backward must not depend on who watches.
        scores = [t.detach() for t in tensors(output) if t.is_floating_point() and t.dim() >= 2]
        if scores:
            widest = max(scores, key=lambda t: t.shape[-1])
            flat = widest.reshape(-1, widest.shape[-1])
            picks = flat.topk(min(k, flat.shape[-1]), dim=-1).indices
            chosen.append(torch.zeros_like(flat, dtype=torch.bool).scatter_(1, picks, True))

    with ExitStack() as hooks:
        for router in routers(model).values():
            hooks.enter_context(router.register_forward_hook(hook))
        return run(), chosen


def unmoved(logits: torch.Tensor, exact: list[torch.Tensor], *others: list[torch.Tensor]) -> torch.Tensor:
    """Mask of logits' rows whose experts were the same in every run, as were those of all earlier tokens of the row."""
    keep = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if keep.dim() < 2:
        return keep
    for other in others:
        for a, b in zip(exact, other, strict=True):
            same = (a == b).all(dim=-1)
            if same.numel() == keep.numel():
                keep &= same.reshape(keep.shape).cummin(dim=1).values
    return keep
