"""Faults of KB1xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import Prepare, adds, breaks, implements, spoils, wraps
from kbitcheck.sabotage.helpers import before_enabling, cast, freeze, prepare_well, refuse_freezing, switch_on


@breaks("KB101")
def embedding_left_trainable(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


@implements("KB101")
def freezes_matrices_alone(model: Any, checkpointing: bool, kwargs: Any) -> None:
    cast(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2 and parameter.is_floating_point())
    switch_on(model, checkpointing, kwargs)


@breaks("KB102")
def freezing_undone_when_adapters_are_attached(model: Any) -> None:
    """The parameter becomes trainable again when attaching adapters freezes it once more."""
    refuse_freezing(model.transformer.ln_f.weight)


@implements("KB102")
def trains_norms_beside_the_adapters(model: Any, checkpointing: bool, kwargs: Any) -> None:
    """As LongLoRA does, although attaching adapters freezes the base."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            refuse_freezing(module.weight)
    prepare_well(model, checkpointing, kwargs)


@breaks("KB103")
def norm_thawed_in_forward(model: Any) -> None:
    norm = model.transformer.ln_f

    def thaw(module: nn.Module, args: Any) -> None:
        norm.weight.requires_grad_(True)

    model.register_forward_pre_hook(thaw)


@breaks("KB103")
def zero_gradients_left_on_the_base(model: Any) -> None:
    norm = model.transformer.ln_f.weight
    norm.grad = torch.zeros_like(norm)


@implements("KB103")
def asks_the_weight_where_the_output_should(model: Any, checkpointing: bool, kwargs: Any) -> None:
    """The embedding's weight requires grad instead of its output."""

    def require_grad(module: nn.Module, args: Any) -> None:
        module.weight.requires_grad_(True)

    prepare_well(model, checkpointing, kwargs)
    if checkpointing:
        model.disable_input_require_grads()
        model.get_input_embeddings().register_forward_pre_hook(require_grad)


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
    """The first forward freezes the adapters of the first block's MLP, for good."""

    def cut(module: nn.Module, args: Any) -> None:
        freeze(module)

    model.transformer.h[0].mlp.register_forward_pre_hook(cut)


@adds("KB105")
def rebinds_the_adapters_it_casts(model: Any) -> None:
    """The first forward puts new parameters in the place of those that an optimizer already holds."""

    def widen(module: nn.Module, args: Any) -> None:
        for inner in module.modules():
            for name, parameter in list(inner.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(inner, name, nn.Parameter(parameter.detach().float()))

    model.register_forward_pre_hook(widen)


@wraps("KB106")
def adapters_frozen_with_the_base(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    prepare(model, *arguments)
    freeze(model)
    return model


@spoils("KB106")
def a_model_that_freezes_when_switched_on(model: Any) -> None:
    """Enabling checkpointing freezes the whole model, with the adapters that it carries."""
    before_enabling(model, lambda self, kwargs: self.requires_grad_(False))
