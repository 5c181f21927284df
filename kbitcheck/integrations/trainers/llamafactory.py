"""LLaMA-Factory's own preparation, called with the arguments that it has by default for a model in four bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.hparams import ModelArguments
from llamafactory.model.model_utils.checkpointing import prepare_model_for_training


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The model, which its adapters freeze later."""
    arguments = ModelArguments(
        model_name_or_path="a model",
        disable_gradient_checkpointing=not use_gradient_checkpointing,
        use_reentrant_gc=(gradient_checkpointing_kwargs or {}).get("use_reentrant", True),
    )
    prepare_model_for_training(model, arguments)
    passed = {"use_reentrant": arguments.use_reentrant_gc, **(gradient_checkpointing_kwargs or {})}
    if len(passed) > 1 and "gradient_checkpointing_enable" in vars(model):  # the others reach it from its trainer
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=passed)
    return model
