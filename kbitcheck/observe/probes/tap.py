"""A place in a graph at which the gradient that passes is seen."""

from collections.abc import Callable
from typing import Any

import torch


class Tap(torch.autograd.Function):
    """The identity; its backward passes the gradient, as hooks on the tensor leave it, to ``caught`` too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, caught: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.caught = caught
        return x.detach()  # shares memory, and is no view: some adapters add to a layer's output in place

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.caught(gradient.detach())
        return gradient, None
