"""Faults of KB4xx."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kbitcheck import backends
from kbitcheck.observe.probes.snapshot import is_block
from kbitcheck.sabotage.fault import Prepare, breaks, wraps


def blocks(model: Any) -> list[Any]:
    """The model's blocks."""
    return [m for m in model.modules() if is_block(m)]


@breaks("KB401")
def every_other_block_off(model: Any) -> None:
    for block in blocks(model)[1::2]:
        block.gradient_checkpointing = False


@wraps("KB402", checkpointing="off")
def always_on(prepare: Prepare) -> Prepare:
    def prepare_model(
        model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
    ) -> Any:
        return prepare(model, True, gradient_checkpointing_kwargs)

    return prepare_model


@breaks("KB403")
def flag_on_but_plain_calls(model: Any) -> None:
    block = blocks(model)[1]
    block._gradient_checkpointing_func = lambda function, *args: function(*args)


@wraps("KB404")
def kwargs_dropped(prepare: Prepare) -> Prepare:
    def prepare_model(
        model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
    ) -> Any:
        return prepare(model, use_gradient_checkpointing)

    return prepare_model


def _hoard(model: Any, where: list[Any]) -> None:
    """Keep every activation of the blocks' insides until the next forward."""
    model.register_forward_pre_hook(lambda module, args: where.clear())
    for block in blocks(model):
        for inner in block.modules():
            inner.register_forward_hook(
                lambda module, args, output: where.append(output) if isinstance(output, torch.Tensor) else None
            )


@breaks("KB405")
def activations_kept_on_the_side(model: Any) -> None:
    _hoard(model, [])


@breaks("KB405", checkpointing="non-reentrant")
def one_checkpoint_round_the_whole_stack(model: Any) -> None:
    stack = model.transformer
    inner = stack.forward
    for block in blocks(model):
        block._gradient_checkpointing_func = lambda function, *args: function(*args)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if stack.training and any(b.gradient_checkpointing for b in blocks(stack)):
            return checkpoint(partial(inner, **kwargs), *args, use_reentrant=False)
        return inner(*args, **kwargs)

    stack.forward = forward


class _Kept(torch.autograd.Function):
    """Keeps a copy of its input where no checkpoint can drop it, as some int8 kernels keep theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = x.clone()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


@breaks("KB405", quant="int8", checkpointing="non-reentrant")
def more_kept_than_the_stack_keeps(model: Any) -> None:
    for module in model.modules():
        if backends.is_quantized(module):
            module.register_forward_pre_hook(
                lambda module, args: (_Kept.apply(args[0]), *args[1:]) if torch.is_grad_enabled() else None
            )


@breaks("KB406")
def a_copy_kept_by_each_block(model: Any) -> None:
    kept: list[Any] = []
    model.register_forward_pre_hook(lambda module, args: kept.clear())

    def hoard(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        kept.append(tensor.detach().clone())

    for block in blocks(model):
        block.register_forward_hook(hoard)


@breaks("KB407", checkpointing="default")
def mode_left_implicit(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint


@breaks("KB408")
def generate_broken(model: Any) -> None:
    def generate(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot generate from a model prepared for training")

    model.generate = generate


@breaks("KB409")
def left_in_eval(model: Any) -> None:
    model.eval()
