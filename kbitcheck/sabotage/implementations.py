"""Broken implementations of every family, written out as people write them: freeze, cast, switch on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.fault import implements

HALF = (torch.float16, torch.bfloat16)


def freeze(model: Any) -> None:
    """No parameter requires grad."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def half(model: Any) -> Iterator[tuple[str, Any]]:
    """Unquantized half-precision parameters, by name."""
    return ((n, p) for n, p in model.named_parameters() if p.dtype in HALF and not backends.is_packed(p))


def cast(model: Any) -> None:
    """Unquantized half-precision parameters become float32."""
    for _, parameter in half(model):
        parameter.data = parameter.data.float()


def switch_on(model: Any, asked: bool, kwargs: Any) -> Any:
    """Checkpointing with its arguments, reentrant where none is given; the model's own hooks come with it."""
    if asked:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": True, **(kwargs or {})})
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()
    return model


@implements("KB101")
def freezes_matrices_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    cast(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2 and parameter.is_floating_point())
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB201")
def casts_what_is_called_layer_norm(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for name, parameter in half(model):
        if "layer_norm" in name:
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


@implements("KB203", model="tiny:llama", alone=True)
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


@implements("KB206", quant="nf4,double")
def flattens_nested_scales(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.absmax, state.state2, state.offset = state.absmax.float() / 255, None, None
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB207")
def dequantizes_projections(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    for name, layer in list(model.named_modules()):
        if backends.is_quantized(layer) and name.endswith("c_fc"):
            rows, columns = backends.shape(layer)
            plain = nn.Linear(columns, rows, bias=layer.bias is not None)
            plain.weight.data.copy_(backends.dequantized(layer))
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


@implements("KB209", quant="nf4,compute=fp32")
def runs_norms_in_bfloat16(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: output.bfloat16().float())
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB210", model="tiny:llama")
def casts_the_head_back(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    model.lm_head.to(torch.bfloat16)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB212")
def offloads_positions(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    model.transformer.wpe.to("meta")
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB301")
def checkpoints_without_input_hooks(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    if use_gradient_checkpointing:
        model.disable_input_require_grads()
    return model


@implements("KB302", model="tiny:llava", quant="fp4")
def hooks_the_text_embedding_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for name, module in model.named_modules():
        if "vision" in name:
            module._forward_hooks.clear()
    return model


@implements("KB303")
def runs_quantized_layers_without_a_graph(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    for module in [m for m in model.modules() if backends.is_quantized(m)][1::4]:
        module.forward = torch.no_grad()(module.forward)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB401", model="tiny:t5")
def checkpoints_the_decoder_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for module in model.encoder.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return model


@implements("KB402", checkpointing="off")
def checkpoints_whatever_is_asked(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(model, True, gradient_checkpointing_kwargs)


@implements("KB404", checkpointing="non-reentrant")
def reentrant_whatever_is_asked(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(
        model, use_gradient_checkpointing, {**(gradient_checkpointing_kwargs or {}), "use_reentrant": True}
    )


@implements("KB407", checkpointing="default")
def an_empty_dictionary_for_none(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    if use_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs or {})
    return model


@implements("KB409")
def readies_the_model_for_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs).train()


@implements("KB504")
def hooks_again_with_every_call(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    model.enable_input_require_grads()
    return model


@implements("KB511")
def rewrites_the_configuration(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    model.config._attn_implementation = "sdpa"
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB603")
def keeps_weights_in_larger_storages(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    for _, parameter in half(model):
        room = torch.zeros(2 * parameter.numel(), dtype=torch.float32)
        room[: parameter.numel()] = parameter.data.float().flatten()
        parameter.data = room[: parameter.numel()].view(parameter.shape)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
