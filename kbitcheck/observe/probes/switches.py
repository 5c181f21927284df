"""What a probe switches on a model or in the process for a while: checkpointing, dropout, the cache, the random state."""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from kbitcheck.core.cases import Checkpointing
from kbitcheck.observe import internals

# Bound before any subject is imported, which may patch them.
CHECKPOINT = torch_checkpoint.checkpoint


@contextmanager
def attributes(*settings: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of objects, as (object, name, value), with other values for a while."""
    before = [(item, name, getattr(item, name)) for item, name, _ in settings]
    for item, name, value in settings:
        setattr(item, name, value)
    try:
        yield
    finally:
        for item, name, value in before:
            setattr(item, name, value)


def mode_of(model: nn.Module) -> Checkpointing:
    """How the model checkpoints, from the flags and functions of its modules."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    if not on:
        return "off"
    functions = [internals.checkpoint_function(m) for m in on]
    modes = {f.keywords.get("use_reentrant") for f in functions if isinstance(f, functools.partial)}
    if modes == {True}:
        return "reentrant"
    return "non-reentrant" if modes == {False} else "default"


@contextmanager
def checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The plain run: no block is checkpointed, for a while.

    If one was, the cache is off too, as in a checkpointed forward: it changes the layout of keys and values, and with it
    the order in which BLAS adds.
    """
    flags = [(module, "gradient_checkpointing", False) for module in _checkpointing(model)]
    with attributes(*flags), cache_off(model) if flags else nullcontext():
        yield


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Nothing that makes two steps of one model differ: no checkpointing, no cache, no dropout or jitter of routers."""
    with checkpointing_off(model), cache_off(model), dropout(model, 0.0):
        yield


def _checkpointing(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]


def cache_off(model: nn.Module) -> AbstractContextManager[None]:
    """No key/value cache, as transformers' Trainer trains; the configurations are restored afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    return attributes(*((c, "use_cache", False) for c in configs if getattr(c, "use_cache", False) is True))


def checkpointing_switched(model: nn.Module, *, use_reentrant: bool) -> AbstractContextManager[None]:
    """The same blocks under the other mode; their inputs are made to require grad, as reentrant checkpointing needs."""

    def checkpoint(function: Any, *args: Any) -> Any:
        floating = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if floating and not any(t.requires_grad for t in args if isinstance(t, torch.Tensor)):
            floating[0].requires_grad_(True)
        return CHECKPOINT(function, *args, use_reentrant=use_reentrant)

    return checkpointed_by(checkpoint, _checkpointing(model))


@contextmanager
def checkpointed_by(function: Callable[..., Any], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules that checkpoint their blocks with another function, for a while."""
    before = [internals.checkpoint_function(m) for m in modules]
    for module in modules:
        internals.set_checkpoint_function(module, function)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            internals.set_checkpoint_function(module, own)


def quietly(function: Callable[[], Any]) -> None:
    """Call a transformers method whose deprecation is not the subject's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function()


def dropout(model: nn.Module, rate: float = 0.1) -> AbstractContextManager[None]:
    """Every dropout of the built model at a rate, and afterwards at the one it had."""
    return attributes(*_dropouts(model, rate))


def set_dropout(model: nn.Module, rate: float) -> None:
    """Give every dropout of the built model a rate, those of modules and those that are plain numbers."""
    for module, name, value in _dropouts(model, rate):
        setattr(module, name, value)


def _dropouts(model: nn.Module, rate: float) -> list[tuple[nn.Module, str, float]]:
    numbers = [
        (module, name, rate)
        for module in model.modules()
        for name, value in vars(module).items()
        if ("dropout" in name or "jitter" in name) and isinstance(value, float) and "layer" not in name
    ]
    return numbers + [(module, "p", rate) for module in model.modules() if isinstance(module, nn.Dropout)]


@contextmanager
def seeded(seed: int, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A private random state on the batch's device, so that a probe draws nothing from the user's.

    A model that asks for a seed of the system's, as Reformer does for its hashes, gets this one: its twins are to hash alike.
    """
    devices = {t.device for t in batch.values() if t.is_cuda}
    with torch.random.fork_rng(devices=devices), attributes((torch, "seed", torch.initial_seed)):
        torch.manual_seed(seed)
        yield


@contextmanager
def checkpoint_spies() -> Iterator[list[dict[str, str]]]:
    """Record the arguments of each call that reaches torch's checkpoint, in both modes."""
    calls: list[dict[str, str]] = []
    signature = inspect.signature(internals.NON_REENTRANT)

    def reentrant(function: Any, preserve: Any, *args: Any) -> Any:
        calls.append({"use_reentrant": "True", "preserve_rng_state": str(preserve)})
        return internals.REENTRANT.apply(function, preserve, *args)

    def non_reentrant(function: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(function, *args, **kwargs)
        bound.apply_defaults()
        recorded = ("preserve_rng_state", "determinism_check", "debug")
        calls.append(
            {"use_reentrant": "False", **internals.as_text({k: v for k, v in bound.arguments.items() if k in recorded})}
        )
        return internals.NON_REENTRANT(function, *args, **kwargs)

    with internals.checkpoint_entries(SimpleNamespace(apply=reentrant), non_reentrant):
        yield calls
