"""What a probe switches on a model or in the process for a while: checkpointing, dropout, the cache, the random state."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from kbitcheck.observe import internals

# Bound before any subject is imported, which may patch them.
CHECKPOINT = torch_checkpoint.checkpoint


@contextmanager
def checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The plain run: every checkpointing flag off, restored afterwards.

    Where one was on the cache is off too, as a checkpointed forward has none: it lays keys and values out in another
    way, and BLAS then adds in another order.
    """
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with cache_off(model) if on else nullcontext():
            yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def cache_off(model: nn.Module) -> Iterator[None]:
    """No key/value cache, as transformers' Trainer trains; the configurations are restored afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    caching: list[Any] = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def checkpointing_switched(model: nn.Module, *, use_reentrant: bool) -> Iterator[None]:
    """The same blocks under the other mode; their inputs are made to require grad, as reentrant checkpointing needs."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    before = [internals.checkpoint_function(m) for m in on]

    def checkpoint(function: Any, *args: Any) -> Any:
        floating = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if floating and not any(t.requires_grad for t in args if isinstance(t, torch.Tensor)):
            floating[0].requires_grad_(True)
        return CHECKPOINT(function, *args, use_reentrant=use_reentrant)

    for module in on:
        internals.set_checkpoint_function(module, checkpoint)
    try:
        yield
    finally:
        for module, function in zip(on, before, strict=True):
            internals.set_checkpoint_function(module, function)


def quietly(function: Callable[[], Any]) -> None:
    """Call a transformers method whose deprecation is not the subject's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function()


@contextmanager
def dropout_raised(model: nn.Module, p: float = 0.1) -> Iterator[None]:
    """Give every dropout of the built model a rate, and afterwards the one it had."""
    changed = set_dropout(model, p)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def set_dropout(model: nn.Module, p: float) -> list[tuple[nn.Module, str, float]]:
    """Give every dropout of the built model a rate, modules and rates kept as plain numbers alike; returns what was."""
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            rates.append((module, "p", module.p))
        rates.extend(
            (module, name, value)
            for name, value in vars(module).items()
            if "dropout" in name and isinstance(value, float) and "layer" not in name
        )
    for module, name, _ in rates:
        setattr(module, name, p)
    return rates


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """A private random state, so that a probe draws nothing from the user's."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def checkpoint_spies() -> Iterator[list[dict[str, str]]]:
    """Record the arguments of each call that reaches torch's checkpoint, in both modes."""
    calls: list[dict[str, str]] = []
    signature = inspect.signature(internals.NON_REENTRANT)

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: Any, *args: Any) -> Any:
            calls.append({"use_reentrant": "True", "preserve_rng_state": str(preserve)})
            return internals.REENTRANT.apply(function, preserve, *args)

    def non_reentrant(function: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(function, *args, **kwargs)
        bound.apply_defaults()
        named = {
            k: str(v) for k, v in bound.arguments.items() if k in ("preserve_rng_state", "determinism_check", "debug")
        }
        calls.append({"use_reentrant": "False", **named})
        return internals.NON_REENTRANT(function, *args, **kwargs)

    with internals.checkpoint_entries(Reentrant, non_reentrant):
        yield calls
