"""What PEFT's function did to a bitsandbytes model from release to release, written anew from its changelog.

``since`` maps a release to what was new in it; between them nothing changed for bitsandbytes (0.5.0, 0.9.0, 0.11.0 and
0.14.0 added other backends, 0.15.0 changed the docstring).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

RELEASES = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.9.0", "0.10.0", "0.11.0", "0.14.0", "0.15.0", "0.20.0")


@dataclass(frozen=True)
class Behaviour:
    """What a release knows of: 4-bit models, checkpointing arguments, packed weights, the allocator's cache."""

    four_bit: bool
    takes_kwargs: bool
    spares_packed: bool
    clears_cache: bool


def behaviour(release: str) -> Behaviour:
    """Of a release by its place in the list above."""
    at = RELEASES.index(release)

    def since(first: str) -> bool:
        return at >= RELEASES.index(first)

    return Behaviour(
        four_bit=since("0.4.0"),
        takes_kwargs=since("0.6.0"),
        spares_packed=since("0.10.0"),
        clears_cache=since("0.20.0"),
    )


def prepare(how: Behaviour, model: Any, checkpoint: bool, kwargs: dict[str, Any] | None) -> Any:
    """Freezes, casts, hooks inputs and switches on, as far as the release knows how."""
    quantized = getattr(model, "is_loaded_in_8bit", False) or (
        how.four_bit and getattr(model, "is_loaded_in_4bit", False)
    )
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.parameters():
        packed = how.spares_packed and type(parameter).__name__ == "Params4bit"
        if parameter.dtype in (torch.float16, torch.bfloat16) and not packed:
            parameter.data = parameter.data.to(torch.float32)
    if quantized and checkpoint:
        if kwargs is None or kwargs.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(*([kwargs or {}] if how.takes_kwargs else []))
    return model


def implementation(how: Behaviour) -> Callable[..., Any]:
    """A function that behaves so, with the signature of its time."""

    def before_kwargs(model: Any, use_gradient_checkpointing: bool = True) -> Any:
        return prepare(how, model, use_gradient_checkpointing, None)

    def with_kwargs(
        model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
    ) -> Any:
        return prepare(how, model, use_gradient_checkpointing, gradient_checkpointing_kwargs)

    def with_cache(
        model: Any,
        use_gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: Any = None,
        auto_clear_cache: bool = True,
    ) -> Any:
        with_kwargs(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return model

    return with_cache if how.clears_cache else with_kwargs if how.takes_kwargs else before_kwargs
