"""Steps on the caller's own model, which is afterwards bitwise what it was."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore, also after an exception, everything that steps and probes change on a model, and every random state.

    Yields a function that restores the model at once. Restored are the class and the attributes of each module, of its configuration
    and of its quantization state (and with them hooks, submodules, modes and switches), what each parameter reads and
    whether it requires grad, the numbers of trainable parameters, of gradients and of buffers. The numbers of frozen
    parameters are not copied: no step writes to them.
    """
    attributes = _Attributes(model)
    tensors = _Tensors(model)

    def restore() -> None:
        attributes.restore()
        tensors.restore()

    try:
        with random_states_restored():
            yield restore
    finally:
        restore()


class _Attributes:
    """Attributes of modules, of configurations, and of parameters with their quantization states; of dictionaries also the entries."""

    def __init__(self, model: nn.Module) -> None:
        owners: list[Any] = [*model.modules(), *model.parameters()]
        for module in model.modules():
            owners += [v for n, v in vars(module).items() if n == "config" or dataclasses.is_dataclass(v)]
            if not any(True for _ in (*module.children(), *module.parameters())):  # a parametrization has its state
                owners += _states(module)
        for parameter in model.parameters():
            owners += _states(parameter)
        unique = {id(owner): owner for owner in owners if hasattr(owner, "__dict__")}
        self._before = [
            (owner, type(owner), {n: (v, _entries(v)) for n, v in vars(owner).items()}) for owner in unique.values()
        ]

    def restore(self) -> None:
        for owner, cls, before in self._before:
            if type(owner) is not cls:
                owner.__class__ = cls
            own = vars(owner)
            own.clear()
            for name, (value, entries) in before.items():
                if entries is not None:
                    value.clear()
                    value.update(entries)
                own[name] = value


def _states(owner: Any) -> list[Any]:
    """Quantization states that an object holds: plain objects with attributes, and those that they hold."""
    held = [
        v for v in vars(owner).values() if hasattr(v, "__dict__") and not isinstance(v, (torch.Tensor, nn.Module, type))
    ]
    states = [v for v in held if not callable(v)]
    return states + [inner for state in states for inner in _states(state)]


def _entries(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, set)) else None


class _Tensors:
    """Parameters, their gradients, and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [
            (p, p.data, p.detach().clone() if p.requires_grad else None, p.requires_grad, p.grad)
            for p in model.parameters()
        ]
        held = [*(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]
        self._numbers = [(tensor, tensor.detach().clone()) for tensor in held]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, data, numbers, wanted, gradient in self._parameters:
            parameter.data = data
            if numbers is not None:
                data.copy_(numbers)
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for tensor, before in self._numbers:
            tensor.copy_(before)


@contextmanager
def random_states_restored() -> Iterator[None]:
    """Put the random states of torch (every device in use), numpy and Python back."""
    states = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
