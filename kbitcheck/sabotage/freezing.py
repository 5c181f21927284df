"""Faults of KB1xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import Prepare, around, breaks, wraps


@breaks("KB101")
def embedding_left_trainable(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


def _thaw_in_forward(model: Any) -> None:
    """A hook that makes the last norm trainable as soon as anything looks at the model in train mode."""
    norm = model.transformer.ln_f

    def thaw(module: nn.Module, args: Any) -> None:
        norm.weight.requires_grad_(True)

    model.register_forward_pre_hook(thaw)


@breaks("KB103")
def norm_thawed_in_forward(model: Any) -> None:
    _thaw_in_forward(model)


@breaks("KB102")
def freezing_undone_when_adapters_are_attached(model: Any) -> None:
    """What attaching freezes is made trainable again: the parameter refuses to be frozen twice."""
    refuse_freezing(model.transformer.ln_f.weight)


def refuse_freezing(weight: Any) -> None:
    """Make a parameter trainable whatever it is asked."""

    class Stubborn(type(weight)):  # type: ignore[misc]
        def requires_grad_(self, requires_grad: bool = True) -> Any:
            return super().requires_grad_(True)

    weight.__class__ = Stubborn


@breaks("KB104")
def norm_decayed_in_a_hook(model: Any) -> None:
    norm = model.transformer.h[1].ln_1

    def decay(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            norm.weight.mul_(0.999)

    model.register_forward_pre_hook(decay)


@breaks("KB105")
def adapter_gradients_dropped(model: Any) -> None:
    """Hooks zero the gradient that reaches each block's second half, for good."""
    block = model.transformer.h[0]

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    block.mlp.register_forward_pre_hook(cut, with_kwargs=True)


@wraps("KB106")
def adapters_frozen_with_the_base(prepare: Prepare) -> Prepare:
    def freeze(model: Any, _: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    return around(prepare, lambda model: None, freeze)
