"""Every private name of transformers that loading needs: no other file of ``models`` uses one.

Each is there in transformers 4.56 and 5.23, unless its line says otherwise; ``tests/unit/test_internals.py`` fails by name
when one moves.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import auto, base
from transformers.utils.quantization_config import QuantizationMethod

from kbitcheck.backends import registry

# Where the methods that ask transformers' common function list the modules that they leave out.
SKIP_KEYS = ("modules_to_not_convert", "llm_int8_skip_modules")


def mapped_class(auto: str, config: PretrainedConfig) -> Any:
    """The first class that the Auto class named ``auto`` has for a configuration; None where it has none."""
    classes = getattr(transformers, auto)._model_mapping.get(type(config), None)
    return classes[0] if isinstance(classes, tuple) else classes


def choose_implementation(config: PretrainedConfig, name: str) -> None:
    """Have a model of this configuration compute attention, and experts since transformers 5, by ``name``."""
    config._attn_implementation = name
    if hasattr(PreTrainedModel, "set_experts_implementation"):
        config._experts_implementation = name


def choose_implementations_of(config: PretrainedConfig, other: PretrainedConfig) -> None:
    """Have a model compute attention and experts as one of ``other`` does, tower by tower: a saved configuration does not say how."""
    towers = [(config, other), *((getattr(config, n, None), getattr(other, n, None)) for n in config.sub_configs)]
    for own, like in towers:
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if own is not None and hasattr(like, name):
                setattr(own, name, getattr(like, name))


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Parts of the names of the parameters that transformers loads in float32 where ``dtype`` is requested."""
    float16_alone = getattr(model, "_keep_in_fp32_modules", None) if dtype is torch.float16 else None
    return {*(float16_alone or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}


def joined_parameters(model: PreTrainedModel) -> Callable[[str], bool]:
    """True for the name of a parameter that loading makes of other tensors than its own; of none before transformers 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return lambda name: False
    converters = [c for c in get_model_conversion_mapping(model) if getattr(c, "operations", None)]
    targets = {target.strip("^$") for converter in converters for target in converter.target_patterns}
    return lambda name: any(target in name for target in targets)


Renaming = Callable[[str], tuple[str, bool]]


def renaming(model: PreTrainedModel) -> Renaming | None:
    """The model's name of a checkpoint's tensor, and whether loading makes it of several; None before transformers 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    own = model.state_dict()

    def rename(name: str) -> tuple[str, bool]:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        return renamed, pattern is not None

    return rename


def tied_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters that a checkpoint leaves out, as they are another by that name too; before transformers 5 none."""
    return frozenset(getattr(model, "all_tied_weights_keys", None) or ())


def untie_head(model: PreTrainedModel) -> None:
    """Give the head of a model on the meta device a weight of its own, as loading does with one that differs."""
    head = model.get_output_embeddings()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in [name for name in tied if model.get_submodule(name.rpartition(".")[0]) is head]:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        tied.pop(name)


def replace_layers(quantizer: Any, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have a quantizer of transformers replace the layers of a model on the meta device by its own."""
    arguments: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": dtype, "torch_dtype": dtype}
    if "keep_in_fp32_modules" in inspect.signature(quantizer._process_model_before_weight_loading).parameters:
        arguments["keep_in_fp32_modules"] = model._keep_in_fp32_modules  # before transformers 5
    quantizer.preprocess_model(model=model, **arguments)
    vars(model)["hf_quantizer"] = quantizer  # as of a loaded model
    if hasattr(base, "_assign_is_quantized"):  # loading does so last; some models compute otherwise then
        base._assign_is_quantized(model)


def quantizers() -> Mapping[str, Any]:
    """The quantizer's class by the name that transformers lists; one method may have several."""
    return auto.AUTO_QUANTIZER_MAPPING


def quantizer_name(config: Mapping[str, Any]) -> str:
    """The name that transformers lists for a ``quantization_config``; the method's own where it lists none."""
    backend = registry.of_method(config)
    method = str(config.get("quant_method") or (backend.method if backend else ""))
    several = [name for name in quantizers() if name.startswith(f"{method}_") and method not in quantizers()]
    chosen = (name for name in several if config.get(f"load_in_{name.removeprefix(f'{method}_')}"))
    return next(chosen, several[-1] if several else method)


def quantizer_of(config: Mapping[str, Any]) -> Any:
    """The quantizer's class for a ``quantization_config``; None where transformers lists none."""
    return quantizers().get(quantizer_name(config))


def method_fields(name: str) -> dict[str, Any]:
    """The least of a ``quantization_config`` that transformers lists under a name."""
    method, _, kind = name.rpartition("_")
    methods = {method.value for method in QuantizationMethod}
    return {"quant_method": method, f"load_in_{kind}": True} if method in methods else {"quant_method": name}


def quantization_config(config: Mapping[str, Any]) -> Any:
    """The object that transformers makes of a ``quantization_config``."""
    return auto.AutoQuantizationConfig.from_dict(dict(config))


def skip_list(model: nn.Module, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that a ``quantization_config`` leaves out, by the names under which transformers looks for them in a model."""
    kind, settings = quantizer_of(config), SimpleNamespace(**config)
    with suppress(Exception):  # a package is missing: the fields are those of the file
        settings = quantization_config(config)
    named = next((list(getattr(settings, key)) for key in SKIP_KEYS if getattr(settings, key, None)), [])
    if named and hasattr(kind, "_normalize_modules_to_not_convert"):  # of FP8, 5.23
        quantizer = object.__new__(kind)
        quantizer.quantization_config = SimpleNamespace(modules_to_not_convert=named)
        quantizer._normalize_modules_to_not_convert(model)
        named = quantizer.quantization_config.modules_to_not_convert
    return tuple(dict.fromkeys(map(str, named)))


def mark_quantized(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Mark a module as loading marks a model of a ``quantization_config``, without loading or packing anything."""
    kind = quantizer_of(config)
    vars(model).update(is_quantized=True, quantization_method=config["quant_method"])
    if kind is not None:
        quantizer = object.__new__(kind)
        # What else it does with a loaded model needs its package.
        with suppress(Exception):
            quantizer._process_model_after_weight_loading(model)
