"""Faults of KB1xx."""

from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import Prepare, adds, breaks, implements, spoils, wraps
from kbitcheck.sabotage.helpers import before_enabling, prepare_well, refuse_freezing
from kbitcheck.sabotage.hooks import before_forward


@breaks("KB101")
def embedding_left_trainable(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


@implements("KB101")
def freezes_matrices_alone(model: Any, checkpointing: bool, kwargs: Any) -> None:
    prepare_well(model, checkpointing, kwargs)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2 and parameter.is_floating_point())


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
    before_forward(model, lambda module: module.transformer.ln_f.weight.requires_grad_(True))


@breaks("KB103")
def zero_gradients_left_on_the_base(model: Any) -> None:
    norm = model.transformer.ln_f.weight
    norm.grad = torch.zeros_like(norm)


@implements("KB103")
def asks_the_weight_where_the_output_should(model: Any, checkpointing: bool, kwargs: Any) -> None:
    """The embedding's weight requires grad instead of its output."""
    prepare_well(model, checkpointing, kwargs)
    if checkpointing:
        model.disable_input_require_grads()
        before_forward(model.get_input_embeddings(), lambda embedding: embedding.weight.requires_grad_(True))


@breaks("KB104")
def norm_decayed_in_a_hook(model: Any) -> None:
    before_forward(model, lambda module: module.transformer.h[1].ln_1.weight.data.mul_(0.999))


@adds("KB104")
def rounds_the_base_as_it_will_be_merged(model: Any) -> None:
    def narrow(module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.dtype == torch.float32 and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16().float()

    before_forward(model, narrow)


@breaks("KB105")
def adapter_gradients_dropped(model: Any) -> None:
    """The first forward freezes the adapters of the first block's MLP, for good."""
    before_forward(model.transformer.h[0].mlp, lambda mlp: mlp.requires_grad_(False))


@adds("KB105")
def rebinds_the_adapters_it_casts(model: Any) -> None:
    """The first forward puts new parameters in the place of those that an optimizer already holds."""

    def widen(module: nn.Module) -> None:
        for inner in module.modules():
            for name, parameter in list(inner.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(inner, name, nn.Parameter(parameter.detach().float()))

    before_forward(model, widen)


@wraps("KB106")
def adapters_frozen_with_the_base(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    return prepare(model, *arguments).requires_grad_(False)


@spoils("KB106")
def a_model_that_freezes_when_switched_on(model: Any) -> None:
    """Enabling checkpointing freezes the whole model, with the adapters that it carries."""
    before_enabling(model, lambda self, kwargs: self.requires_grad_(False))
