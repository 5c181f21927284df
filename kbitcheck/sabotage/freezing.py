"""Faults of KB1xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import Prepare, adds, around, breaks, implements, spoils, wraps
from kbitcheck.sabotage.helpers import (
    cast,
    doing_first,
    freeze,
    refuse_freezing,
    subclass,
    switch_on,
)


@breaks("KB101")
def embedding_left_trainable(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


@implements("KB101")
def freezes_matrices_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    cast(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2 and parameter.is_floating_point())
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@breaks("KB102")
def freezing_undone_when_adapters_are_attached(model: Any) -> None:
    """What attaching freezes is made trainable again: the parameter refuses to be frozen twice."""
    refuse_freezing(model.transformer.ln_f.weight)


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


def _thaw_in_forward(model: Any) -> None:
    """A hook that makes the last norm trainable as soon as anything looks at the model in train mode."""
    norm = model.transformer.ln_f

    def thaw(module: nn.Module, args: Any) -> None:
        norm.weight.requires_grad_(True)

    model.register_forward_pre_hook(thaw)


@breaks("KB103")
def norm_thawed_in_forward(model: Any) -> None:
    _thaw_in_forward(model)


@breaks("KB103")
def zero_gradients_left_on_the_base(model: Any) -> None:
    norm = model.transformer.ln_f.weight
    norm.grad = torch.zeros_like(norm)


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


@breaks("KB104")
def norm_decayed_in_a_hook(model: Any) -> None:
    norm = model.transformer.h[1].ln_1

    def decay(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            norm.weight.mul_(0.999)

    model.register_forward_pre_hook(decay)


@adds("KB104")
def rounds_the_base_as_it_will_be_merged(model: Any) -> None:
    def narrow(module: nn.Module, args: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype == torch.float32 and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16().float()

    model.register_forward_pre_hook(narrow)


@breaks("KB105")
def adapter_gradients_dropped(model: Any) -> None:
    """Hooks zero the gradient that reaches each block's second half, for good."""
    block = model.transformer.h[0]

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    block.mlp.register_forward_pre_hook(cut, with_kwargs=True)


@adds("KB105")
def rebinds_the_adapters_it_casts(model: Any) -> None:
    """In the first forward, when an optimizer holds them already."""

    def widen(module: nn.Module, args: Any) -> None:
        for inner in module.modules():
            for name, parameter in list(inner.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(inner, name, nn.Parameter(parameter.detach().float()))

    model.register_forward_pre_hook(widen)


@wraps("KB106")
def adapters_frozen_with_the_base(prepare: Prepare) -> Prepare:
    def freeze(model: Any, _: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    return around(prepare, lambda model: None, freeze)


@spoils("KB106")
def a_model_that_freezes_when_switched_on(model: Any) -> None:
    """Everything, and with it the adapters that it carries."""
    subclass(model, **doing_first(lambda self, kwargs: self.requires_grad_(False)))
