"""Parts of models and steps of preparations that several faults need."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kbitcheck import backends
from kbitcheck.backends.quantization import Quantization
from kbitcheck.models.blocks import is_block
from kbitcheck.models.sources.resolve import resolve

HALF = (torch.float16, torch.bfloat16)


def half(model: Any) -> Iterator[tuple[str, Any]]:
    """Unquantized half-precision parameters, by name."""
    return ((n, p) for n, p in model.named_parameters() if p.dtype in HALF and not backends.is_packed(p))


def cast(model: Any, part: str = "") -> None:
    """Cast the unquantized half-precision parameters with ``part`` in their names to float32."""
    for name, parameter in half(model):
        if part in name:
            parameter.data = parameter.data.float()


def switch_on(model: Any, checkpointing: bool, kwargs: Any) -> None:
    """Enable checkpointing, reentrant unless ``kwargs`` says otherwise, and the model's input hooks, once."""
    if checkpointing:
        if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()
        enable(model, {"use_reentrant": True, **(kwargs or {})})
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()


def prepare_well(model: Any, checkpointing: bool, kwargs: Any, *, cast: Callable[[Any], None] = cast) -> None:
    """Freeze, cast and enable checkpointing, as a good implementation does."""
    model.requires_grad_(False)
    cast(model)
    switch_on(model, checkpointing, kwargs)


def enable(model: Any, kwargs: Any) -> None:
    """Enable checkpointing by the method that the installed transformers has."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(kwargs)


def blocks(model: Any) -> list[Any]:
    """The model's blocks."""
    return [m for m in model.modules() if is_block(m)]


def quantized(model: Any) -> list[Any]:
    """The model's quantized layers."""
    return [m for _, m in backends.quantized_layers(model)]


def dequantize(model: Any, name: str, dtype: torch.dtype | None = None) -> None:
    """Replace a quantized layer by a frozen plain one, in ``dtype`` or else in the dtype of the unpacked weight."""
    layer = model.get_submodule(name)
    weight = backends.arithmetic(layer).unpacked(layer)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    plain.bias = layer.bias
    model.set_submodule(name, plain)


def layer_of(recipe: str, quant: str, name: str) -> Any:
    """A layer of a fresh model of a recipe, quantized as ``quant`` says."""
    return resolve(recipe).load(Quantization.parse(quant)).get_submodule(name)


def corrupt(layer: Any, part: str, factor: float = 1.02) -> None:
    """Break a quantized layer's weight in place: its ``code``, a ``scale`` (times ``factor``) or its ``nested`` state."""
    backends.recognition(layer).corrupt(layer, part, factor)


def call(function: Any, *args: Any) -> Any:
    """Stands for a checkpoint function, and recomputes nothing."""
    return function(*args)


def refuse_freezing(weight: Any) -> None:
    """Make a parameter trainable, and keep it trainable when it is frozen."""

    class Stubborn(type(weight)):  # type: ignore[misc]
        def requires_grad_(self, requires_grad: bool = True) -> Any:
            return super().requires_grad_(True)

    weight.__class__ = Stubborn


def subclass(module: Any, name: str = "", **methods: Any) -> None:
    """Give a module a class of this name, or of the same one, with other methods."""
    cls = type(module)
    module.__class__ = type(name or cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def before_enabling(model: Any, action: Any) -> None:
    """Have ``action(model, kwargs)`` run before transformers enables checkpointing, by any name (4.x has one)."""

    def method(name: str) -> Any:
        def enable(self: Any, *args: Any, **kwargs: Any) -> Any:
            action(self, next(iter((*args, *kwargs.values())), None))
            return getattr(super(type(self), self), name)(*args, **kwargs)

        return enable

    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    subclass(model, **{name: method(name) for name in names if hasattr(PreTrainedModel, name)})
