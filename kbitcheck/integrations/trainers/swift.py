"""The step of ms-swift's trainer that switches checkpointing on: ms-swift prepares nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from kbitcheck.observe.in_place import random_states_restored

with random_states_restored():  # imports draw from them, and the trainer seeds them later
    from swift.trainers.mixin import SwiftMixin


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The model, which its adapters freeze later."""
    arguments = SimpleNamespace(
        gradient_checkpointing=use_gradient_checkpointing,
        vit_gradient_checkpointing=use_gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": True, **(gradient_checkpointing_kwargs or {})},
    )
    model.model_meta = SimpleNamespace(is_multimodal=False, model_arch=None)  # ms-swift's loader sets it
    try:
        SwiftMixin._prepare_gradient_checkpointing(SimpleNamespace(args=arguments), model)
    finally:
        del model.model_meta
    return model
