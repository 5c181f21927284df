"""Hooks by which several faults change what a module computes, or keep it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def change_input(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Run a module on ``change`` of its first input."""
    module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))


def change_output(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Have a module return ``change`` of its output, or of the first where it is a tuple, as a block's in transformers 4."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.register_forward_hook(hook)


def change_gradient(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``x`` itself, with ``change`` of its gradient."""
    same = x.view_as(x)
    if same.requires_grad:
        same.register_hook(change)
    return same


def before_forward(module: nn.Module, action: Callable[[Any], object]) -> None:
    """Have ``action(module)`` run before each forward of a module."""

    def hook(module: nn.Module, args: Any) -> None:
        action(module)

    module.register_forward_pre_hook(hook)


def hoard(model: Any, modules: Iterable[nn.Module]) -> None:
    """Keep every output of ``modules`` until the model's next forward."""
    kept: list[Any] = []
    model.register_forward_pre_hook(lambda module, args: kept.clear())
    for module in modules:
        module.register_forward_hook(lambda module, args, output: kept.append(output))
