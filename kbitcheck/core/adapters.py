"""Which adapters a case trains, as text: a library's plain LoRA, or a configuration of PEFT's.

``reference`` and ``peft`` are a plain LoRA of the reference's and of PEFT's. ``peft:DoRA`` is a configuration by its short name,
``peft:{"peft_type": ...}`` any other, as PEFT saves it in ``adapter_config.json``.
"""

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean

LIBRARIES = ("reference", "peft")
PREFIX = "peft:"
FORMS = "reference|peft|peft:NAME|FILE.json"

_PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
# The least of a configuration by its short name: what is left open is PEFT's default, or the case's targets and rank.
NAMED: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {"peft_type": "LORA"},
    "rsLoRA": {"peft_type": "LORA", "use_rslora": True},
    "DoRA": {"peft_type": "LORA", "use_dora": True},
    "PiSSA": {"peft_type": "LORA", "init_lora_weights": "pissa"},
    "OLoRA": {"peft_type": "LORA", "init_lora_weights": "olora"},
    "LoftQ": {"peft_type": "LORA", "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "EVA": {"peft_type": "LORA", "init_lora_weights": "eva"},
    "AdaLoRA": {"peft_type": "ADALORA", "total_step": 100},
    "LoHa": {"peft_type": "LOHA"},
    "LoKr": {"peft_type": "LOKR"},
    "IA3": {"peft_type": "IA3", "feedforward_modules": r".*(down_proj|c_proj|fc2|wo)"},
    "VeRA": {"peft_type": "VERA"},
    "OFT": {"peft_type": "OFT"},
    "BOFT": {"peft_type": "BOFT"},
    "HRA": {"peft_type": "HRA"},
    "MiSS": {"peft_type": "MISS"},
    "RandLoRA": {"peft_type": "RANDLORA"},
    "FourierFT": {"peft_type": "FOURIERFT", "n_frequency": 64},
    "SHiRA": {"peft_type": "SHIRA"},
    "prompt-tuning": {"peft_type": "PROMPT_TUNING", **_PROMPTS},
    "prefix-tuning": {"peft_type": "PREFIX_TUNING", **_PROMPTS},
    "p-tuning": {"peft_type": "P_TUNING", **_PROMPTS},
}
# Of where a saved configuration was used, and of no adapter.
PROVENANCE = frozenset({"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"})


def as_text(adapters: Any) -> str:
    """The text of adapters that are named, in a file or a configuration object of PEFT's.

    Raises:
        UsageError: there is no such name or file, or the file is no configuration of PEFT's.
    """
    if not isinstance(adapters, str):
        return PREFIX + _dumped(_fields_of(adapters))
    if adapters in LIBRARIES:
        return adapters
    name = adapters.removeprefix(PREFIX)
    named = {each.lower(): each for each in NAMED}
    if name.startswith("{"):
        return PREFIX + _dumped(_read(name, "--adapters"))
    if adapters.startswith(PREFIX):
        if name.lower() not in named:
            suggested = did_you_mean(name.lower(), named)
            raise UsageError(f"no adapters are named {adapters!r}{suggested}; use {', '.join(NAMED)} or a FILE.json")
        return PREFIX + named[name.lower()]
    file = Path(adapters)
    if file.suffix != ".json" and not file.is_file():
        suggested = did_you_mean(PREFIX + named.get(name.lower(), name), [PREFIX + each for each in NAMED], cutoff=0.8)
        suggested = did_you_mean(adapters, LIBRARIES) or suggested
        raise UsageError(f"no such --adapters: {adapters!r}{suggested}; use {FORMS}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the adapters' configuration {adapters}: {error}") from None
    return PREFIX + _dumped(_read(text, adapters))


def fields(adapters: str) -> Mapping[str, Any] | None:
    """The fields of the configuration that the text of adapters names; None for a library's plain LoRA."""
    if adapters in LIBRARIES:
        return None
    name = adapters.removeprefix(PREFIX)
    return NAMED[name] if name in NAMED else json.loads(name)


def _read(text: str, where: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise UsageError(f'{where} is no configuration of PEFT\'s: it has no "peft_type"')
    return values


def _fields_of(configuration: Any) -> Mapping[str, Any]:
    """The fields of a configuration object that are not its defaults."""
    if not dataclasses.is_dataclass(configuration) or not hasattr(configuration, "peft_type"):
        raise UsageError(f"adapters are a name, a file or a configuration of PEFT's, not {configuration!r}")
    values = {each.name: getattr(configuration, each.name) for each in dataclasses.fields(configuration)}
    defaults = {
        each.name: each.default_factory() if callable(each.default_factory) else each.default
        for each in dataclasses.fields(configuration)
    }
    return {n: v for n, v in values.items() if n == "peft_type" or (v is not None and v != defaults[n])}


def _dumped(values: Mapping[str, Any]) -> str:
    # A null is what a field is if nobody names it.
    kept = {name: value for name, value in values.items() if name not in PROVENANCE and value is not None}
    try:
        return json.dumps(kept, sort_keys=True, default=_plain)
    except TypeError as error:
        raise UsageError(f"the configuration cannot be written as JSON: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is no plain value")
