"""What every implementation does: freeze, cast, switch on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kbitcheck import backends

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
