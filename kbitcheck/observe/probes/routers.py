"""Routers of experts: rounding can move their choices, and with them a whole token's logits."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from kbitcheck.core.facts import RouterFacts
from kbitcheck.observe.probes.live import tensors

T = TypeVar("T")

ROUTER = re.compile(r"(router|topk|gate)$|router", re.IGNORECASE)


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that choose experts: by class, or a linear named ``gate`` beside experts. What is inside one is part of it."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in modules):
            continue
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


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The scores of each router's calls while the context is open: (tokens, experts), in order."""
    scores: dict[str, list[torch.Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            floating = [t.detach() for t in tensors(output) if t.is_floating_point() and t.dim() >= 2]
            if floating:
                widest = max(floating, key=lambda t: t.shape[-1])
                scores.setdefault(name, []).append(widest.reshape(-1, widest.shape[-1]))

        return hook

    with ExitStack() as hooks:
        for name, router in routers(model).items():
            hooks.enter_context(router.register_forward_hook(record(name)))
        yield scores


def stability(model: nn.Module, scores: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, RouterFacts]:
    """By router that ran twice: whether the second call, the recompute, picked the experts of the first."""
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 2
    seen = {}
    for name, calls in scores.items():
        if len(calls) == 2 and calls[0].shape == calls[1].shape and chosen < calls[0].shape[-1]:
            ordered = calls[0].float().topk(chosen + 1, dim=-1).values
            apart, ulp = ordered[:, -2] - ordered[:, -1], torch.finfo(calls[0].dtype).eps
            one, other = (c.topk(chosen, dim=-1).indices.sort(dim=-1).values for c in calls)
            seen[name] = RouterFacts(
                tokens=len(calls[0]),
                changed=int((one != other).any(dim=-1).sum()),
                near_ties=int((apart <= ulp * ordered[:, -2].abs()).sum()),
            )
    return seen


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
