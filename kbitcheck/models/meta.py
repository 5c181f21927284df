"""A quantized model on the meta device: every name, shape, dtype and quantization state of the real one, no number.

transformers itself says which layers are replaced, and the quantizer's backend what a packed weight and its state
look like.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models import load as loading
from kbitcheck.models.sources.source import Source


def build(source: Source, quant: Quantization) -> PreTrainedModel:
    """The model that loading ``source`` quantized by ``quant`` would give, in eval mode, on the meta device.

    ``quant`` holds what the source skips by itself too (``Source.meta`` adds it).

    Raises:
        UsageError: transformers does not know the model, or it cannot be built.
    """
    fields = {k: v for k, v in source.config.items() if k != "quantization_config"}
    dtype: torch.dtype = getattr(torch, source.unquantized_dtype)
    config: Any = loading.configuration(fields, name=source.name)
    with loading.quiet(), loading.errors_as_usage(source.name):
        cls = loading.architecture(config, trust_remote_code=source.trust_remote_code)
        if source.attention:
            config._attn_implementation = source.attention
            if hasattr(PreTrainedModel, "set_experts_implementation"):
                config._experts_implementation = source.attention
        with _default_dtype(dtype):
            model = loading.empty(cls, config)
            # A checkpoint that is quantized already states all it skips.
            skip = loading.automatic_skip(cls, config) if quant.skip and source.quant is None else []
            _replace_layers(model, quant, skip, dtype)
        _keep_in_float32(model, dtype)
        quant.backend.packing.quantize_empty(model, dtype)
        model.tie_weights()
        model.eval()
    return model


def _replace_layers(model: PreTrainedModel, quant: Quantization, skip: list[str], dtype: torch.dtype) -> None:
    """Let transformers put its quantized layers in."""
    configured = quant.config(skip)
    if configured is None:
        quant.backend.quantize(
            model, quant, [*(skip or loading.automatic_skip(type(model), model.config)), *quant.skip]
        )
        return
    quantizer: Any = AutoHfQuantizer.from_config(configured, pre_quantized=False)
    asked = {"device_map": {"": "cpu"}, "dtype": dtype, "torch_dtype": dtype}
    if "keep_in_fp32_modules" in inspect.signature(quantizer._process_model_before_weight_loading).parameters:
        asked["keep_in_fp32_modules"] = model._keep_in_fp32_modules  # before transformers 5
    quantizer.preprocess_model(model=model, **asked)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What transformers loads in float32 whatever is asked for."""
    wide = {
        *(getattr(model, "_keep_in_fp32_modules", None) or () if dtype is torch.float16 else ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    for name, parameter in model.named_parameters():
        if wide.intersection(name.split(".")):
            parameter.data = parameter.data.to(torch.float32)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
