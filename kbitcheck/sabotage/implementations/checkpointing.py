"""Broken implementations of KB4xx."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kbitcheck import backends
from kbitcheck.sabotage.checkpointing import blocks
from kbitcheck.sabotage.fault import implements
from kbitcheck.sabotage.implementations.steps import cast, freeze, switch_on


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


@implements("KB403")
def leaves_out_the_last_block(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """It would be recomputed at once."""
    freeze(model)
    cast(model)
    switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    blocks(model)[-1]._gradient_checkpointing_func = lambda function, *args: function(*args)
    return model


@implements("KB404", checkpointing="non-reentrant")
def reentrant_whatever_is_asked(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(
        model, use_gradient_checkpointing, {**(gradient_checkpointing_kwargs or {}), "use_reentrant": True}
    )


@implements("KB405")
def collects_inputs_to_initialise_adapters(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    def collect(module: nn.Module, args: Any) -> None:
        module.calibration = args[0].detach()

    freeze(model)
    cast(model)
    for module in model.modules():
        if backends.is_quantized(module):
            module.register_forward_pre_hook(collect)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


def _offloading(function: Any, *args: Any) -> Any:
    """A checkpoint that copies its inputs to the host, and keeps them."""
    with saved_tensors_hooks(lambda t: (t, t.to("cpu", copy=True)), lambda pair: pair[1].to(pair[0].device)):
        return checkpoint(function, *args, use_reentrant=True)


@implements("KB406")
def keeps_what_it_offloads(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for block in blocks(model):
        block._gradient_checkpointing_func = _offloading
    return model


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


@implements("KB408")
def takes_the_arguments_that_trainers_pass(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    inner = model.forward

    def forward(
        input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None
    ) -> Any:
        return inner(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels)

    freeze(model)
    cast(model)
    model.forward = forward
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@implements("KB409")
def readies_the_model_for_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs).train()
