"""Which parameters of a caller's model are meant to train: those of adapters, and those that the caller names."""

from collections.abc import Mapping, Sequence

from kbitcheck_reference.adapters import adapter_parameters, enabled_biases, is_adapter_module
from torch import nn

from kbitcheck import backends
from kbitcheck.core.errors import UsageError


def owned(model: nn.Module, declared: Mapping[str, nn.Parameter] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: adapters' and ``declared`` ones; a second adapter that rests is no part of it."""
    adapters = adapter_parameters(model)
    ids = {**adapters, **{id(p): p for p in (declared or {}).values()}}
    if adapters:
        ids |= enabled_biases(model, ids)
    resting = _resting(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in ids and (parameter.requires_grad or not resting & set(name.split(".")))
    }


def declared(model: nn.Module, trains: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of the modules and parameters that ``trains`` names, by a part of their path as ``v_head`` is one.

    Raises:
        UsageError: a name matches no floating parameter.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() and not backends.is_packed(p)}
    named: dict[str, nn.Parameter] = {}
    for name in trains:
        matching = {n: p for n, p in parameters.items() if f".{name}." in f".{n}."}
        if not matching:
            raise UsageError(f"trains={name!r}: the model has no unquantized parameter of that name")
        named |= matching
    return named


def _resting(model: nn.Module) -> set[str]:
    """Names of PEFT's adapters that are loaded and not active."""
    names: set[str] = set(getattr(model, "peft_config", None) or {})
    layers = [getattr(m, "active_adapters", None) for m in model.modules() if is_adapter_module(m)]
    return names.difference(*(active for active in layers if isinstance(active, list)))
