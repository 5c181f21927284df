"""Which parameters of a caller's model are meant to train: those of adapters, and those that the caller names."""

from collections.abc import Mapping
from typing import Any

import torch
from kbitcheck_reference.adapters import adapter_parameters, configured_biases, enabled_biases, is_adapter_module
from torch import nn

from kbitcheck import backends
from kbitcheck.core.errors import UsageError
from kbitcheck.core.training import Training
from kbitcheck.observe import internals
from kbitcheck.observe.twin.wide_parameter import Widened

# AdaLoRA's count of ranks: a frozen parameter, which PEFT makes anew, and trainable, where it casts it.
CONSTANTS = frozenset({"ranknum"})


def owned(model: nn.Module, declared: Mapping[str, nn.Parameter] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: adapters' and ``declared`` ones; a second adapter that rests is no part of it, nor is a constant."""
    adapters = adapter_parameters(model)
    ids = {**adapters, **{id(p): p for p in (declared or {}).values()}}
    if adapters:
        ids |= {**enabled_biases(model, ids), **configured_biases(model)}
    resting = _resting(model) | CONSTANTS
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in ids and (parameter.requires_grad or not resting & set(name.split(".")))
    }


def regularized(model: nn.Module) -> frozenset[int]:
    """The ids of adapters on which the loss depends outside their blocks, too: AdaLoRA adds to it how far its factors are from orthogonal."""
    wrappers = [m for m in model.modules() if _orthogonality(m)]
    return frozenset(
        id(p) for m in wrappers for n, p in m.named_parameters() if {"lora_A", "lora_B"} & set(n.split("."))
    )


def _orthogonality(module: nn.Module) -> float:
    """The weight of that term."""
    configs = getattr(module, "peft_config", None)
    weights = [getattr(each, "orth_reg_weight", 0.0) for each in configs.values()] if isinstance(configs, dict) else []
    return max(weights, default=0.0)


def declared(model: nn.Module, training: Training) -> dict[str, nn.Parameter]:
    """The parameters that the caller says train beside adapters, by name."""
    return {n: p for n, p in _trainable(model).items() if training.names(n)} if training.trains else {}


def require_declared(model: nn.Module, training: Training) -> None:
    """Raise ``UsageError`` where a name in ``trains`` is that of no unquantized parameter."""
    for name in training.trains:
        if not declared(model, Training(trains=[name])):
            raise UsageError(f"trains={name!r}: the model has no unquantized parameter of that name")


def with_own_numbers(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter of the model with numbers that nothing else shares, in ``dtype`` where one is named."""
    owner, _, last = name.rpartition(".")
    held = internals.own_parameters(model.get_submodule(owner))
    parameter: Any = held[last]
    if isinstance(parameter, Widened):  # a twin's, which cannot train
        held[last] = parameter = nn.Parameter(parameter.stored.to(dtype or parameter.dtype, copy=True))
    else:
        parameter.data = parameter.data.to(dtype or parameter.dtype, copy=True)
    own: nn.Parameter = parameter
    return own


def thaw(model: nn.Module, training: Training) -> dict[str, nn.Parameter]:
    """The parameters that the caller says train beside adapters, by name, each with numbers of its own and requiring grad."""
    thawed = {name: with_own_numbers(model, name) for name in declared(model, training)}
    for parameter in thawed.values():
        parameter.requires_grad_(True)
    return thawed


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.is_floating_point() and not backends.is_packed(p)}


def _resting(model: nn.Module) -> set[str]:
    """Names of PEFT's adapters that are loaded and not active."""
    names: set[str] = set(getattr(model, "peft_config", None) or {})
    layers = [getattr(m, "active_adapters", None) for m in model.modules() if is_adapter_module(m)]
    return names.difference(*(active for active in layers if isinstance(active, list)))
