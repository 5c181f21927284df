"""Find the parameters that an adapter library owns, by library type or marker (KB106).

Flags cannot tell: every parameter of a freshly loaded model is trainable.
"""

from functools import cache
from typing import Any

from torch import nn

MARKER = "is_adapter_layer"

# Children of adapter modules that hold the base model's own layers.
_BASE_CHILDREN = frozenset({"base_layer", "original_module", "model", "base_model", "word_embeddings"})
_ADAPTER_PACKAGE = "peft"


def is_adapter_module(module: nn.Module) -> bool:
    """Whether a module belongs to PEFT, by the package of a class in its MRO, or carries the marker of this package."""
    cls: Any = type(module)
    return vars(module).get(MARKER) is True or _of_adapter_library(cls)


@cache
def _of_adapter_library(cls: type) -> bool:
    marked = getattr(cls, MARKER, False) is True
    return marked or any(base.__module__.split(".")[0] == _ADAPTER_PACKAGE for base in cls.__mro__)


def adapter_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters that adapters own, by ``id``: low-rank pairs, magnitudes, ``modules_to_save`` copies, prompt vectors.

    ``model`` is a ``PeftModel``, or any module with or without tuner layers inside. Base layers inside adapter layers
    (``base_layer``, ``original_module``) are not among them.
    """
    adapters: dict[int, nn.Parameter] = {}
    _collect(model, owned=False, adapters=adapters)
    return adapters


def enabled_biases(model: nn.Module, adapters: dict[int, nn.Parameter]) -> dict[int, nn.Parameter]:
    """The base biases, by ``id``, that an adapter library left trainable on purpose (PEFT's ``bias="all"``).

    Empty where a base weight is trainable too: then nobody froze the base. ``adapters`` are ``adapter_parameters(model)``.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapters}
    frozen = all(name.rpartition(".")[2] == "bias" for name in trainable)
    return {id(parameter): parameter for parameter in trainable.values()} if frozen else {}


def configured_biases(model: nn.Module) -> dict[int, nn.Parameter]:
    """The base biases, by ``id``, that the configuration of an active adapter trains, whether or not they require grad.

    PEFT's ``bias="all"`` are those of every module, ``bias="lora_only"`` and the like those of the adapted layers.
    """
    configs = getattr(model, "peft_config", None) or {}
    if not isinstance(configs, dict):
        return {}
    active: Any = getattr(model, "active_adapters", ()) if configs else ()
    if callable(active):  # as of a model to which transformers itself adds adapters
        active = active()
    wanted = {str(getattr(configs[name], "bias", "none")) for name in active if name in configs}
    everywhere = "all" in wanted
    if not everywhere and not any(each.endswith("_only") for each in wanted):
        return {}
    holders = [m for m in model.modules() if everywhere or hasattr(m, "base_layer")]
    biases = [getattr(getattr(m, "base_layer", m), "bias", None) for m in holders]
    return {id(bias): bias for bias in biases if isinstance(bias, nn.Parameter)}


def _collect(module: nn.Module, *, owned: bool, adapters: dict[int, nn.Parameter]) -> None:
    adapter = is_adapter_module(module)
    if owned or adapter:
        adapters.update((id(parameter), parameter) for parameter in module.parameters(recurse=False))
    for name, child in module.named_children():
        is_base = adapter and name in _BASE_CHILDREN
        _collect(child, owned=(owned or adapter) and not is_base, adapters=adapters)
