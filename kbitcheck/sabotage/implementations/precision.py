"""Broken implementations of KB2xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.fault import implements
from kbitcheck.sabotage.freezing import refuse_freezing
from kbitcheck.sabotage.implementations.steps import HALF, adds, cast, freeze, half, switch_on


@implements("KB201")
def casts_what_is_called_layer_norm(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for name, parameter in half(model):
        if "layer_norm" in name:
            parameter.data = parameter.data.float()
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB215", model="tiny:llama", profile="frozen-half")
def casts_norms_of_attention_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for name, parameter in half(model):
        if "input_layernorm" in name:
            parameter.data = parameter.data.float()
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB202")
def casts_norms_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB203", model="tiny:llama")
def scales_norms_before_the_cast(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for name, parameter in half(model):
        if "norm" in name:
            parameter.data = parameter.data * (1 + 2.0**-6)
    cast(model)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB204", model="tiny:t5", quant="nf4,storage=fp16,compute=fp32")
def casts_everything_to_bfloat16_first(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and not backends.is_packed(parameter):
            parameter.data = parameter.data.bfloat16().float()
    cast(model)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB205", quant="nf4,storage=bf16")
def casts_packed_weights_too(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for parameter in model.parameters():
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@adds("KB206", quant="nf4,double")
def flattens_nested_scales(model: Any) -> None:
    for _, layer in backends.quantized_layers(model):
        backends.corrupt(layer, "nested")


@implements("KB207")
def dequantizes_projections(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    for name, layer in list(model.named_modules()):
        if backends.is_quantized(layer) and name.endswith("c_fc"):
            rows, columns = backends.shape(layer)
            plain = nn.Linear(columns, rows, bias=layer.bias is not None)
            plain.weight.data.copy_(backends.unpacked(layer))
            plain.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    freeze(model)
    cast(model)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB208")
def rebinds_what_it_casts(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in HALF and not backends.is_packed(parameter):
                setattr(module, name, nn.Parameter(parameter.float()))
    freeze(model)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@adds("KB209", quant="nf4,compute=fp32")
def runs_norms_in_bfloat16(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: output.bfloat16().float())


@adds("KB210", model="tiny:llama")
def casts_the_head_back(model: Any) -> None:
    model.lm_head.to(torch.bfloat16)


@adds("KB211")
def trains_positions_in_float16(model: Any) -> None:
    positions = model.transformer.wpe.half()
    refuse_freezing(positions.weight)


@adds("KB212")
def offloads_positions(model: Any) -> None:
    model.transformer.wpe.to("meta")
