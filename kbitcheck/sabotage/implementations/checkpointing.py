"""Broken implementations of KB4xx."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kbitcheck import backends
from kbitcheck.sabotage.checkpointing import blocks
from kbitcheck.sabotage.fault import implements
from kbitcheck.sabotage.implementations.steps import adds, cast, freeze, switch_on


@adds("KB401", last=True, model="tiny:t5")
def checkpoints_the_decoder_alone(model: Any) -> None:
    for module in model.encoder.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


@implements("KB402", checkpointing="off")
def checkpoints_whatever_is_asked(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(model, True, gradient_checkpointing_kwargs)


@adds("KB403", last=True)
def leaves_out_the_last_block(model: Any) -> None:
    """It would be recomputed at once."""
    blocks(model)[-1]._gradient_checkpointing_func = lambda function, *args: function(*args)


@implements("KB404", checkpointing="non-reentrant")
def reentrant_whatever_is_asked(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(
        model, use_gradient_checkpointing, {**(gradient_checkpointing_kwargs or {}), "use_reentrant": True}
    )


@adds("KB405")
def collects_inputs_to_initialise_adapters(model: Any) -> None:
    def collect(module: nn.Module, args: Any) -> None:
        module.calibration = args[0].detach()

    for module in model.modules():
        if backends.is_quantized(module):
            module.register_forward_pre_hook(collect)


def _offloading(function: Any, *args: Any) -> Any:
    """A checkpoint that copies its inputs to the host, and keeps them."""
    with saved_tensors_hooks(lambda t: (t, t.to("cpu", copy=True)), lambda pair: pair[1].to(pair[0].device)):
        return checkpoint(function, *args, use_reentrant=True)


@adds("KB406", last=True)
def keeps_what_it_offloads(model: Any) -> None:
    for block in blocks(model):
        block._gradient_checkpointing_func = _offloading


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


@adds("KB408")
def takes_the_arguments_that_trainers_pass(model: Any) -> None:
    inner = model.forward

    def forward(
        input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None
    ) -> Any:
        return inner(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels)

    model.forward = forward


@adds("KB409", last=True)
def readies_the_model_for_training(model: Any) -> None:
    model.train()
