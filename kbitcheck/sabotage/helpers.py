"""Parts of models and steps of preparations that several faults need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from kbitcheck import backends
from kbitcheck.observe.probes.snapshot import is_block

HALF = (torch.float16, torch.bfloat16)


def freeze(model: Any) -> None:
    """No parameter requires grad."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def half(model: Any) -> Iterator[tuple[str, Any]]:
    """Unquantized half-precision parameters, by name."""
    return ((n, p) for n, p in model.named_parameters() if p.dtype in HALF and not backends.is_packed(p))


def cast(model: Any) -> None:
    """Unquantized half-precision parameters become float32."""
    for _, parameter in half(model):
        parameter.data = parameter.data.float()


def switch_on(model: Any, checkpointing: bool, kwargs: Any) -> Any:
    """Checkpointing with its arguments, reentrant by default; the model's own hooks come with it, once."""
    if checkpointing:
        if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": True, **(kwargs or {})})
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()
    return model


def blocks(model: Any) -> list[Any]:
    """The model's blocks."""
    return [m for m in model.modules() if is_block(m)]


def quantized(model: Any) -> list[Any]:
    """The model's quantized layers."""
    return [m for m in model.modules() if backends.is_quantized(m)]


def refuse_freezing(weight: Any) -> None:
    """Make a parameter trainable, and keep it so when it is frozen."""

    class Stubborn(type(weight)):  # type: ignore[misc]
        def requires_grad_(self, requires_grad: bool = True) -> Any:
            return super().requires_grad_(True)

    weight.__class__ = Stubborn


def hoard(model: Any, where: list[Any]) -> None:
    """Keep every activation of the blocks' insides until the next forward."""
    model.register_forward_pre_hook(lambda module, args: where.clear())
    for block in blocks(model):
        for inner in block.modules():
            inner.register_forward_hook(
                lambda module, args, output: where.append(output) if isinstance(output, torch.Tensor) else None
            )


def subclass(model: Any, **methods: Any) -> None:
    """Give a model a class of the same name with other methods."""
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def doing_first(before: Any) -> dict[str, Any]:
    """The names under which transformers switches checkpointing on (4.x has one), with something done first."""

    def named(name: str) -> Any:
        def enable(self: Any, *args: Any, **kwargs: Any) -> Any:
            before(self, next(iter((*args, *kwargs.values())), None))
            return getattr(super(type(self), self), name)(*args, **kwargs)

        return enable

    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    return {name: named(name) for name in names if hasattr(PreTrainedModel, name)}
