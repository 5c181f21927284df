"""Adapters of modules that transformers 5 renamed or gathered: where PEFT puts them when it loads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from kbitcheck.core.facts.adapter import BASE_LAYER, SavedAdapter

PREFIX = "base_model.model."
NAME = "default"  # of the adapter, which PEFT puts into names as it loads them


def beside(model: Any, adapter: SavedAdapter) -> SavedAdapter:
    """The adapter, with the base's module for each layer whose own name the base lacks."""
    modules = {name for name, _ in model.named_modules()}
    lacking = [layer.of_base for layer in adapter.layers.values() if layer.module and layer.of_base not in modules]
    if not lacking or adapter.method != "LORA":  # PEFT converts no other method
        return adapter
    places = {name: place for name, place in _places(model, lacking).items() if place in modules}
    layers = {
        name: dataclasses.replace(layer, placed=places.get(layer.of_base, "")) for name, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def _places(model: Any, modules: Iterable[str]) -> Mapping[str, str]:
    """By module, the one whose adapter PEFT makes of its own; none before transformers 5, and with a PEFT that converts no names."""
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {}
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return {}
    conversions: Any = get_model_conversion_mapping(model)
    every = build_peft_weight_mapping(conversions, NAME, LoraConfig())
    renamings = [each for each in every if isinstance(each, WeightRenaming)]
    converters = [each for each in every if isinstance(each, WeightConverter)]
    places = {}
    for module in modules:
        key = f"{PREFIX}{module}.lora_A.weight"
        renamed = rename_source_key(key, renamings, converters)[0]
        if not key.endswith(renamed.replace(f".{NAME}", "")):  # PEFT leaves such a name as it is
            path = renamed.removeprefix(PREFIX).partition(".lora_A")[0].split(".")
            places[module] = ".".join(part for part in path if part != BASE_LAYER)
    return places
