"""Broken implementations of KB1xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import implements
from kbitcheck.sabotage.freezing import refuse_freezing
from kbitcheck.sabotage.implementations.steps import adds, cast, freeze, switch_on


@implements("KB101")
def freezes_matrices_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    cast(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2 and parameter.is_floating_point())
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB102")
def trains_norms_beside_the_adapters(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """As LongLoRA does, whatever attaching adapters freezes."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            refuse_freezing(module.weight)
    freeze(model)
    cast(model)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB103")
def asks_the_weight_where_the_output_should(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    def ask(module: nn.Module, args: Any) -> None:
        module.weight.requires_grad_(True)

    freeze(model)
    cast(model)
    switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    if use_gradient_checkpointing:
        model.disable_input_require_grads()
        model.get_input_embeddings().register_forward_pre_hook(ask)
    return model


@adds("KB104")
def rounds_the_base_as_it_will_be_merged(model: Any) -> None:
    def narrow(module: nn.Module, args: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype == torch.float32 and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16().float()

    model.register_forward_pre_hook(narrow)


@adds("KB105")
def rebinds_the_adapters_it_casts(model: Any) -> None:
    """In the first forward, when an optimizer holds them already."""

    def widen(module: nn.Module, args: Any) -> None:
        for inner in module.modules():
            for name, parameter in list(inner.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(inner, name, nn.Parameter(parameter.detach().float()))

    model.register_forward_pre_hook(widen)
