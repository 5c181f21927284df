"""What every implementation does: freeze, cast, switch on; and those that do one thing besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kbitcheck import backends
from kbitcheck.sabotage.fault import implements

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


def switch_on(model: Any, asked: bool, kwargs: Any) -> Any:
    """Checkpointing with its arguments, reentrant where none is given; the model's own hooks come with it, once."""
    if asked:
        if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": True, **(kwargs or {})})
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()
    return model


def adds(code: str, *, last: bool = False, **case: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register an implementation that does this to the model besides: before it switches on, or ``last`` of all."""

    def register(do: Callable[[Any], None]) -> Callable[[Any], None]:
        def prepare(
            model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
        ) -> Any:
            freeze(model)
            cast(model)
            if not last:
                do(model)
            switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
            if last:
                do(model)
            return model

        prepare.__name__, prepare.__module__ = do.__name__, do.__module__
        implements(code, **case)(prepare)
        return do

    return register
