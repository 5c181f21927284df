"""A quantized model on the meta device: every name, shape, dtype and quantization state of the real one, no number.

transformers itself says which layers are replaced, and bitsandbytes' own functions, which run on the meta device too,
say what a packed weight and its state look like.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models import load as loading
from kbitcheck.models.sources.source import Source

META = torch.device("meta")


def build(source: Source, quant: Quantization) -> PreTrainedModel:
    """The model that loading ``source`` quantized by ``quant`` would give, in eval mode, on the meta device.

    ``quant`` holds what the source skips by itself too (``Source.meta`` adds it).

    Raises:
        UsageError: transformers does not know the model, or it cannot be built.
    """
    fields = {k: v for k, v in source.config.items() if k != "quantization_config"}
    dtype: torch.dtype = getattr(torch, source.unquantized_dtype)
    config: Any = loading.known_config(fields, name=source.name)
    with loading.quiet(), loading.told(source.name):
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
        _quantize(model, dtype)
        model.tie_weights()
        model.eval()
    return model


def _replace_layers(model: PreTrainedModel, quant: Quantization, skip: list[str], dtype: torch.dtype) -> None:
    """Let transformers put its quantized layers in."""
    quantizer: Any = AutoHfQuantizer.from_config(quant.config(skip), pre_quantized=False)
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


def _quantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Give each replaced layer the packed weight and the state that quantizing its weight would leave."""
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())  # never to be made on the meta device
    for module in model.modules():
        if not isinstance(module, Linear4bit | Linear8bitLt):
            continue
        old: Any = module.weight
        full = torch.empty(module.out_features, module.in_features, dtype=dtype, device=META)
        settings = {k: v for k, v in old.__dict__.items() if k != "SCB"}
        kind: Any = Params4bit if isinstance(module, Linear4bit) else Int8Params
        weight = kind(full, requires_grad=False, **settings)
        weight._quantize(META)  # ``to`` leaves meta tensors alone
        module.weight = weight
        if isinstance(module, Linear4bit):
            state = module.quant_state = weight.quant_state
            if state.nested:
                state.offset = torch.zeros((), dtype=state.offset.dtype)  # ``state_dict`` reads it


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
