"""The private names of transformers that more than one backend needs, to quantize in its place; ``tests/unit/test_internals.py``."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers.quantizers import auto

from kbitcheck.backends.packed import skipped


def mark(model: nn.Module, config: Any, *, pre_quantized: bool) -> Any:
    """Give a model the marks of one that transformers quantized by ``config``: its quantizer, which is returned, and its flags.

    Where transformers lacks a package that it wants for the method, the model has no quantizer.
    """
    marked: Any = model
    marked.config.quantization_config = config
    vars(marked).update(is_quantized=True, quantization_method=config.quant_method)
    try:
        quantizer: Any = auto.AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)
    except ImportError:
        return None
    marked.config.quantization_config = quantizer.quantization_config
    vars(marked)["hf_quantizer"] = quantizer
    return quantizer


def kept_wide(model: nn.Module) -> Sequence[str]:
    """Modules that transformers never quantizes, because they compute in float32, or its models read their weight."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def replace_linear(model: nn.Module, skip: Sequence[str], make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put what ``make`` makes of a name and a layer in the place of each of torch's own linear layers; what ``skip`` names stays."""
    stays = skipped([*skip, *kept_wide(model)])
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not stays(name):
            model.set_submodule(name, make(name, module))
