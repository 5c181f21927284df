"""How transformers' Trainer switches checkpointing on when training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def switch_on(model: Any, arguments: Mapping[str, Any] | None) -> None:
    """Switch checkpointing on by the method that the Trainer of the installed transformers calls: the older is deprecated."""
    passed = dict(arguments or {}) or None
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=passed)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=passed)
