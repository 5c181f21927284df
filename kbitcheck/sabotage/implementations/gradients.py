"""Broken implementations of KB3xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kbitcheck import backends
from kbitcheck.sabotage.checkpointing import blocks
from kbitcheck.sabotage.fault import implements
from kbitcheck.sabotage.implementations.steps import adds, cast, freeze, switch_on


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


@adds("KB302", last=True, model="tiny:llava", quant="fp4")
def hooks_the_text_embedding_alone(model: Any) -> None:
    for name, module in model.named_modules():
        if "vision" in name:
            module._forward_hooks.clear()


@adds("KB303")
def runs_quantized_layers_without_a_graph(model: Any) -> None:
    for module in [m for m in model.modules() if backends.is_quantized(m)][1::4]:
        module.forward = torch.no_grad()(module.forward)


@adds("KB304", quant="int8")
def sends_gradients_between_blocks_in_bfloat16(model: Any) -> None:
    def narrow(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output  # a tuple in transformers 4
        if states.requires_grad:
            states.register_hook(lambda gradient: gradient.bfloat16().to(gradient.dtype))

    for block in blocks(model):
        block.register_forward_hook(narrow)


def _stashing(function: Any, *args: Any) -> Any:
    """A checkpoint that keeps its inputs in bfloat16."""
    pack: Any = (
        lambda t: t.bfloat16() if t.dtype == torch.float32 else t,
        lambda t: t.float() if t.dtype == torch.bfloat16 else t,
    )
    with saved_tensors_hooks(*pack):
        return checkpoint(function, *args, use_reentrant=True)


@adds("KB305", last=True)
def stashes_inputs_in_bfloat16(model: Any) -> None:
    for block in blocks(model):
        block._gradient_checkpointing_func = _stashing


@adds("KB306", checkpointing="non-reentrant")
def takes_no_grad_for_inference(model: Any) -> None:
    """Runs norms in half there; reentrant checkpointing runs its first forward there."""

    def narrow(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if torch.is_grad_enabled() else output.bfloat16().float()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(narrow)


@implements("KB307")
def saves_no_random_state(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(
        model, use_gradient_checkpointing, {**(gradient_checkpointing_kwargs or {}), "preserve_rng_state": False}
    )


@adds("KB309")
def freezes_again_with_every_forward(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, args: freeze(module))
