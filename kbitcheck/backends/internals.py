"""The private names of transformers that more than one backend needs, to quantize in its place; ``tests/unit/test_internals.py``."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers import auto


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
