"""The step of axolotl's loader that prepares a quantized model and converts its norms and embeddings back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault

from kbitcheck.integrations.trainers.checkpointing import switch_on


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The model, frozen."""
    loader = ModelLoader.__new__(ModelLoader)  # whose own __init__ reads a checkpoint's configuration
    loader.model, loader.model_config, loader.reference_model = model, model.config, False
    loader.cfg = DictDefault(
        adapter="qlora",
        load_in_4bit=bool(getattr(model, "is_loaded_in_4bit", False)),
        load_in_8bit=bool(getattr(model, "is_loaded_in_8bit", False)),
        torch_dtype=model.dtype,
        model_config_type=model.config.model_type,
        gradient_checkpointing=use_gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": True, **(gradient_checkpointing_kwargs or {})},
    )
    loader._configure_embedding_dtypes()
    if use_gradient_checkpointing:  # its trainer does so again when it begins
        switch_on(loader.model, loader.cfg.gradient_checkpointing_kwargs)
    return loader.model
