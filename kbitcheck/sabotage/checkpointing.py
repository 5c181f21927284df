"""Faults of KB4xx."""

from functools import partial
from typing import Any

import torch
from kbitcheck_reference import prepare_model_for_kbit_training
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kbitcheck.observe.internals import checkpoint_function, set_checkpoint_function
from kbitcheck.sabotage.fault import Prepare, adds, breaks, implements, spoils, wraps
from kbitcheck.sabotage.helpers import before_enabling, blocks, call, cast, enable, prepare_well, quantized
from kbitcheck.sabotage.hooks import before_forward, change_gradient, change_input, change_output, hoard


@breaks("KB401")
def every_other_block_off(model: Any) -> None:
    for block in blocks(model)[1::2]:
        block.gradient_checkpointing = False


@adds("KB401", last=True, model="tiny:t5")
def checkpoints_the_decoder_alone(model: Any) -> None:
    for module in model.encoder.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


@wraps("KB402", checkpointing="off")
def always_on(prepare: Prepare, model: Any, checkpointing: bool, kwargs: Any) -> Any:
    return prepare(model, True, kwargs)


@breaks("KB402", checkpointing="off")
def flags_switched_on_afterwards(model: Any) -> None:
    for block in blocks(model)[1:]:
        block.gradient_checkpointing = True


@implements("KB402", checkpointing="off")
def checkpoints_whatever_is_asked(model: Any, checkpointing: bool, kwargs: Any) -> None:
    prepare_well(model, True, kwargs)


@breaks("KB403")
def flag_on_but_plain_calls(model: Any) -> None:
    set_checkpoint_function(blocks(model)[1], call)


@adds("KB403", last=True)
def leaves_out_the_last_block(model: Any) -> None:
    """To save time: the last block's recompute follows its forward at once."""
    set_checkpoint_function(blocks(model)[-1], call)


@wraps("KB404")
def kwargs_dropped(prepare: Prepare, model: Any, checkpointing: bool, kwargs: Any) -> Any:
    return prepare(model, checkpointing)


@wraps("KB404", own_signature=True)
def loses_what_is_passed_by_position(
    model: Any, use_gradient_checkpointing: bool = True, *ignored: Any, **keywords: Any
) -> Any:
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing, **keywords)


@wraps("KB404")
def keeps_the_callers_own_dictionary(prepare: Prepare, model: Any, checkpointing: bool, kwargs: Any) -> Any:
    model = prepare(model, checkpointing, kwargs)
    if checkpointing and kwargs:
        for module in model.modules():
            kept = checkpoint_function(module)
            if isinstance(kept, partial):
                set_checkpoint_function(module, lambda *args: checkpoint(*args, **kwargs))
    return model


@spoils("KB404")
def a_model_that_drops_the_arguments(model: Any) -> None:
    before_enabling(model, lambda self, kwargs: kwargs.pop("preserve_rng_state", None) if kwargs else None)


@implements("KB404", checkpointing="non-reentrant")
def reentrant_whatever_is_asked(model: Any, checkpointing: bool, kwargs: Any) -> None:
    prepare_well(model, checkpointing, {**(kwargs or {}), "use_reentrant": True})


@breaks("KB405")
def activations_kept_on_the_side(model: Any) -> None:
    hoard(model, [module for block in blocks(model) for module in block.modules()])


@breaks("KB405", checkpointing="non-reentrant")
def one_checkpoint_round_the_whole_stack(model: Any) -> None:
    stack = model.transformer
    inner = stack.forward
    for block in blocks(model):
        set_checkpoint_function(block, call)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if stack.training and any(b.gradient_checkpointing for b in blocks(stack)):
            return checkpoint(partial(inner, **kwargs), *args, use_reentrant=False)
        return inner(*args, **kwargs)

    stack.forward = forward


def _remembered(x: Any) -> Any:
    """``x`` itself; the graph keeps a copy of it where no checkpoint can free it, as some int8 kernels keep theirs."""
    copy = x.clone()
    return change_gradient(x, lambda gradient: gradient.view_as(copy))


@breaks("KB405", quant="int8", checkpointing="non-reentrant")
def more_kept_than_the_stack_keeps(model: Any) -> None:
    for layer in quantized(model):
        change_input(layer, _remembered)


@breaks("KB405", model="tiny:llama", quant="nf4", checkpointing="reentrant")
def outputs_of_quantized_layers_kept(model: Any) -> None:
    hoard(model, [layer for block in blocks(model) for layer in quantized(block)])


@adds("KB405")
def collects_inputs_to_initialise_adapters(model: Any) -> None:
    def collect(module: nn.Module, args: Any) -> None:
        module.calibration = args[0].detach()

    for layer in quantized(model):
        layer.register_forward_pre_hook(collect)


@breaks("KB406")
def a_copy_kept_by_each_block(model: Any) -> None:
    kept: list[Any] = []

    def keep(states: Any) -> Any:
        kept.append(states.detach().clone())
        return states

    model.register_forward_pre_hook(lambda module, args: kept.clear())
    for block in blocks(model):
        change_output(block, keep)


def _offloading(function: Any, *args: Any) -> Any:
    """A checkpoint that copies its inputs to the host, and keeps them."""
    with saved_tensors_hooks(lambda t: (t, t.to("cpu", copy=True)), lambda pair: pair[1].to(pair[0].device)):
        return checkpoint(function, *args, use_reentrant=True)


@adds("KB406", last=True)
def keeps_what_it_offloads(model: Any) -> None:
    for block in blocks(model):
        set_checkpoint_function(block, _offloading)


@breaks("KB407", checkpointing="default")
def mode_left_implicit(model: Any) -> None:
    for module in model.modules():
        if checkpoint_function(module) is not None:
            set_checkpoint_function(module, checkpoint)


@implements("KB407", checkpointing="default")
def an_empty_dictionary_for_none(model: Any, checkpointing: bool, kwargs: Any) -> None:
    model.requires_grad_(False)
    cast(model)
    if checkpointing:
        enable(model, kwargs or {})


@breaks("KB408")
def generate_broken(model: Any) -> None:
    def generate(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot generate from a model prepared for training")

    model.generate = generate


@adds("KB408")
def takes_the_arguments_that_trainers_pass(model: Any) -> None:
    inner = model.forward

    def forward(
        input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None
    ) -> Any:
        return inner(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels)

    model.forward = forward


@breaks("KB409")
def left_in_eval(model: Any) -> None:
    model.eval()


@adds("KB409", last=True)
def readies_the_model_for_training(model: Any) -> None:
    model.train()


def _counting(module: nn.Module) -> None:
    """Have a module count its forwards in a buffer, as routers count what they send to each expert."""
    module.register_buffer("forwards", torch.zeros((), dtype=torch.long))
    before_forward(module, lambda module: module.forwards.add_(1))


@breaks("KB410", checkpointing="non-reentrant")
def a_counter_that_counts_the_recompute(model: Any) -> None:
    _counting(blocks(model)[0].mlp)


@adds("KB410", last=True)
def counts_the_forwards_of_the_last_block(model: Any) -> None:
    _counting(blocks(model)[-1].mlp)
