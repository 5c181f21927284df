"""Which tensor of an adapter's file belongs to which module of the base, which start at zero, and which replace the base's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kbitcheck.core.facts.adapter import BASE_LAYER

# The tensors of a method begin with its name, but for these.
BEGIN = {"ADALORA": "lora_", "LOHA": "hada_", "XLORA": "lora_"}
TOKENS = "trainable_tokens_"  # of embeddings, beside any method
LOW_RANK = ("LORA", "ADALORA")
PREFIXES = ("base_model.model.", "base_model.")
OWN = ("modules_to_save", "token_adapter", BASE_LAYER, "original_module", "ln_tuning_layers")

# The tensors that are zero at first where the configuration leaves the start at its default (PEFT 0.21.2; a test looks).
ZERO_AT_START: Mapping[str, tuple[str, ...]] = {
    "LORA": ("lora_B", "lora_embedding_A"),
    "ADALORA": ("lora_E",),
    "LOHA": ("hada_w2_b",),
    "LOKR": ("lokr_w1", "lokr_w1_a"),
    "OFT": ("oft_R", "oft_embedding_R"),
    "BOFT": ("boft_R",),
    "MISS": ("miss_block",),
}
STARTS_OF_LORA = (True, "gaussian", "eva")
REQUIRED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "LORA": (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")),
    "ADALORA": (("lora_A", "lora_B", "lora_E"),),
    "LOHA": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs: the module's path, the part of its adapter, and whether the part is the module's own tensor."""

    module: str
    part: str
    own: bool


def place_of(key: str, method: str) -> Place:
    """The place of a tensor by its name in the file, as PEFT of any release writes it, with the adapter's name or without."""
    name = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)
    path = name.split(".")
    begins = BEGIN.get(method, f"{method.lower()}_")
    index = next((i for i, part in enumerate(path) if part.startswith((begins, TOKENS)) and part not in OWN), None)
    if index is None:
        module = [part for part in path[:-1] if part not in OWN]
        if "modules_to_save" in path and path.index("modules_to_save") + 1 < len(path) - 1:
            del module[path.index("modules_to_save")]  # the adapter's name
        return Place(".".join(module), path[-1], own=True)
    bias = "_bias" if path[-1] == "bias" and index < len(path) - 1 else ""
    module = [part for part in path[:index] if part != "token_adapter"]
    return Place(".".join(module), path[index] + bias, own=False)


def zero_at_start(method: str, config: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """The parts that are zero until a step moves them; where there are none, why the file does not tell whether it moved."""
    parts = ZERO_AT_START.get(method)
    start = config.get("init_lora_weights" if method in LOW_RANK else "init_weights", True)
    if parts is None:
        return (), f"how {method} starts is not stored"
    if start not in STARTS_OF_LORA if method == "LORA" else start is not True:
        name = "at random" if start is False else f"by {start!r}"
        return (), f"it was begun {name}, and that start is not stored"
    return parts, ""


def trains_whole(module: str, part: str, method: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration has a tensor of the base's own train, which is then stored whole."""
    if method == "LN_TUNING" or (part == "bias" and config.get("bias", "none") != "none"):
        return True
    return any(f".{name}." in f".{module}." for name in config.get("modules_to_save") or ())


def token_rows(module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The rows of an embedding that the configuration has train: those that the file stores."""
    stated = config.get("trainable_token_indices") or config.get("token_indices") or ()
    if isinstance(stated, dict):
        stated = next((rows for name, rows in stated.items() if f".{module}".endswith(f".{name}")), ())
    return tuple(stated)


def stated_for(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that names the module or the end of its path, as ``rank_pattern`` is read."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
