"""PEFT's plain LoRA layers by their definition: a twin that ran the code under test would have its faults, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from kbitcheck.observe import internals
from kbitcheck.observe.probes.adapters import Attached

LIBRARY = "peft."
# PEFT's layer of what is not bitsandbytes': it rounds the sum, where the others round what they add.
ROUNDS_THE_SUM = ("peft.tuners.lora.layer", "Linear")


def by_definition(attached: Attached) -> Attached:
    """A twin with its adapters, whose plain LoRA layers compute what their factors say, whatever the class's code does."""
    define(attached.model)
    return attached


def define(twin: nn.Module) -> nn.Module:
    """A twin whose plain LoRA layers, and LoRA on stacks of experts, compute by definition: the base plus ``scaling * B @ A``.

    A variant, as DoRA, keeps its code, and so does a class that is not PEFT's, which may mean another function.
    """
    for module in twin.modules():
        if type(module).__module__.startswith(LIBRARY) and hasattr(module, "lora_A") and "forward" not in vars(module):
            on_stack = hasattr(module, "parameter_name")
            vars(module)["forward"] = partial(_on_stack if on_stack else _on_layer, module)
    return twin


def _on_layer(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a layer returns: that of its base, plus each adapter's part."""
    adapters = _plain(layer)
    if adapters is None or kwargs or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x, *args)
    rounds_the_sum = ROUNDS_THE_SUM in {(c.__module__, c.__name__) for c in type(layer).__mro__}
    dtype = result.dtype
    # Under autocast, of a GPU alone, PEFT leaves the input of bitsandbytes' layers as it is, and what it adds, too.
    casts = rounds_the_sum or not torch.is_autocast_enabled()
    for adapter in adapters:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        entering = x.to(a.weight.dtype) if casts else x
        narrow = linear(layer.lora_dropout[adapter](entering), a.weight, a.bias)
        added = linear(narrow, b.weight, b.bias) * layer.scaling[adapter]
        result = result + (added.to(dtype) if casts and not rounds_the_sum else added)
    return result.to(dtype) if rounds_the_sum else result


def _on_stack(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a module returns that reads a stack of weights, with each adapter's part in it."""
    adapters, base = _plain(layer), layer.get_base_layer()
    held = internals.own_parameters(base).get(layer.parameter_name)
    if adapters is None or held is None or (added := _stack(layer, held, adapters)) is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    with _reads(base, layer.parameter_name, added):
        return layer.base_layer(x, *args, **kwargs)


def _plain(layer: Any) -> list[str] | None:
    """The active adapters of a layer whose definition is that of LoRA; None where it is not."""
    if layer.merged or layer.disable_adapters or not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    variants = getattr(layer, "lora_variant", None) or {}
    others = [name for name in layer.active_adapters if name in (getattr(layer, "lora_embedding_A", None) or {})]
    if others or any(name in variants or layer.use_dora.get(name) for name in active):
        return None
    factors = [factor[name] for factor in (layer.lora_A, layer.lora_B) for name in active]
    return active if all(type(factor) is nn.Linear for factor in factors) else None


def _stack(layer: Any, held: torch.Tensor, adapters: list[str]) -> torch.Tensor | None:
    """The stack of weights with the adapters' parts in it; None where its layout cannot be told."""
    if held.dim() != 3 or held.shape[1] == held.shape[2]:
        return None
    stack, experts = held, held.shape[0]
    with torch.autocast(held.device.type, enabled=False):
        for adapter in adapters:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            a = a.reshape(experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
            left, right = (b, a) if held.shape[1:] == (b.shape[1], a.shape[2]) else (a.mT, b.mT)
            stack = torch.baddbmm(stack, left.to(held.dtype), right.to(held.dtype), alpha=layer.scaling[adapter])
    return stack


@contextmanager
def _reads(base: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[None]:
    """The module reads a tensor in place of its parameter."""
    parameters: dict[str, Any] = internals.own_parameters(base)
    own = parameters[name]
    parameters[name] = tensor
    try:
        yield
    finally:
        parameters[name] = own
