"""Find the parameters that an adapter library owns, by library type or marker (KB106).

Flags cannot tell: every parameter of a freshly loaded model is trainable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

MARKER = "is_adapter_layer"

# Children of adapter modules that hold the base model's own layers.
_BASE_CHILDREN = frozenset({"base_layer", "original_module", "model", "base_model", "word_embeddings"})
_ADAPTER_PACKAGE = "peft"


def is_adapter_module(module: nn.Module) -> bool:
    """Whether a module belongs to PEFT, by the package of a class in its MRO, or carries the marker of this package."""
    if getattr(module, MARKER, False) is True:
        return True
    return any(base.__module__.split(".")[0] == _ADAPTER_PACKAGE for base in type(module).__mro__)


def adapter_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """Collect the parameters that adapters own: low-rank pairs, magnitudes, ``modules_to_save`` copies, prompt vectors.

    Args:
        model: a model with or without adapters; a ``PeftModel`` or a plain module with tuner layers inside.

    Returns:
        The parameters by ``id``; empty where the model carries no adapters. Base layers inside adapter layers
        (``base_layer``, ``original_module``) are not among them.
    """
    adapters: dict[int, nn.Parameter] = {}
    _collect(model, owned=False, adapters=adapters)
    return adapters


def enabled_biases(model: nn.Module, adapters: dict[int, nn.Parameter]) -> dict[int, nn.Parameter]:
    """Collect the base biases that an adapter library left trainable on purpose (PEFT's ``bias="all"``).

    They are told from a base nobody froze by what else trains: a trainable base weight means no freezing took place.

    Args:
        model: a model that carries adapters.
        adapters: what ``adapter_parameters(model)`` returned.

    Returns:
        The biases by ``id``; empty where the base was never frozen.
    """
    trainable = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters
    }
    if not all(name.rpartition(".")[2] == "bias" for name in trainable):
        return {}
    return {id(parameter): parameter for parameter in trainable.values()}


def _collect(module: nn.Module, *, owned: bool, adapters: dict[int, nn.Parameter]) -> None:
    adapter = is_adapter_module(module)
    if owned or adapter:
        adapters.update((id(parameter), parameter) for parameter in module.parameters(recurse=False))
    for name, child in module.named_children():
        is_base = adapter and name in _BASE_CHILDREN
        _collect(child, owned=(owned or adapter) and not is_base, adapters=adapters)
