"""Broken implementations of KB5xx, and of KB603."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import implements
from kbitcheck.sabotage.implementations.steps import adds, cast, freeze, half, switch_on


@adds("KB504", last=True)
def hooks_again_with_every_call(model: Any) -> None:
    model.enable_input_require_grads()


@implements("KB505")
def hooks_beside_what_the_model_hooks(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    def make_inputs_require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    freeze(model)
    cast(model)
    if use_gradient_checkpointing:
        model.get_input_embeddings().register_forward_hook(make_inputs_require_grad)
    return switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


class _CastOutputToFloat(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return super().forward(x).float()


@adds("KB510")
def wraps_the_head(model: Any) -> None:
    """As PEFT 0.2 did."""
    model.lm_head = _CastOutputToFloat(model.lm_head)


@adds("KB511")
def rewrites_the_configuration(model: Any) -> None:
    model.config._attn_implementation = "sdpa"


@adds("KB512")
def draws_the_embedding_of_the_padding(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[-1].normal_(std=0.02)


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
