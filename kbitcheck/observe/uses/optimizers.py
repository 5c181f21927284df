"""What each optimizer makes of the adapters."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from kbitcheck.backends import registry
from kbitcheck.observe.uses.subject import Outcome, Subject, Value, attempt, numbers, use

RATE = 0.01
STEPS = 2
SPARSE = torch.optim.SparseAdam  # of gradients that adapters do not have


def optimizers() -> dict[str, Any]:
    """Every optimizer of torch and of the quantizers' libraries, by name."""
    own = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    others = (kind for backend in registry.available() for kind in backend.optimizers())
    return {n: c for n, c in own.items() if c not in (torch.optim.Optimizer, SPARSE)} | {
        f"{c.__module__.partition('.')[0]} {c.__name__}": c for c in others
    }


@use
def steps_of_every_optimizer(subject: Subject) -> Outcome:
    """How each moves adapters by the same gradients, which a step gave, of every fifth adapter."""
    model, every = subject.attached()
    subject.loss(model).backward()
    adapters = dict(list(every.items())[::5])
    start = [p.detach().clone() for p in adapters.values()]
    gradients = [None if p.grad is None else p.grad.clone() for p in adapters.values()]

    def gather() -> torch.Tensor:
        for parameter, gradient in zip(adapters.values(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return torch.zeros(())

    def stepped(kind: Callable[..., Any]) -> torch.Tensor:
        for parameter, value in zip(adapters.values(), start, strict=True):
            parameter.data.copy_(value)
        optimizer = kind(list(adapters.values()), lr=RATE)
        for _ in range(STEPS):
            gather()
            optimizer.step(gather)
        return numbers(adapters.values()) - numbers(start)

    def adapters_after(kind: Callable[..., Any]) -> Callable[[], Value]:
        return lambda: stepped(kind)

    return {f"what {name} changed": attempt(adapters_after(kind)) for name, kind in optimizers().items()}
