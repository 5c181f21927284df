"""Faults of KB3xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kbitcheck import backends
from kbitcheck.sabotage.fault import Prepare, adds, around, breaks, implements, wraps
from kbitcheck.sabotage.helpers import (
    blocks,
    cast,
    freeze,
    quantized,
    switch_on,
)

EXACT = {"model": "tiny:gpt2", "quant": "nf4,compute=fp32"}


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def scale_after(module: nn.Module, factor: float, when: Any = lambda args: True) -> None:
    """Scale the gradient that comes back through a module, on the calls that ``when`` picks by their first input."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not when(args[0] if args else None):
            return output
        if isinstance(output, tuple):
            return (ScaledGradient.apply(output[0], factor), *output[1:])
        return ScaledGradient.apply(output, factor)

    module.register_forward_hook(hook)


@breaks("KB301")
def input_hooks_removed(model: Any) -> None:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


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


@breaks("KB302", checkpointing="non-reentrant")
def first_blocks_cut_off(model: Any) -> None:
    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(t.detach() for t in output) if isinstance(output, tuple) else output.detach()

    model.transformer.h[1].register_forward_hook(cut)


@adds("KB302", last=True, model="tiny:llava", quant="fp4")
def hooks_the_text_embedding_alone(model: Any) -> None:
    for name, module in model.named_modules():
        if "vision" in name:
            module._forward_hooks.clear()


@breaks("KB303")
def cut_hidden_by_the_residual_stream(model: Any) -> None:
    layer = quantized(model)[2]
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))


@breaks("KB303", model="tiny:llama", quant="int8")
def gradient_scaled_in_one_layer(model: Any) -> None:
    layer = quantized(model)[4]
    layer.register_forward_pre_hook(lambda module, args: (ScaledGradient.apply(args[0], 1.02), *args[1:]))


class _Clamped(torch.autograd.Function):
    """The identity; its gradient is made finite and small."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.nan_to_num().clamp(-1, 1)


@breaks("KB303")
def large_gradients_clamped(model: Any) -> None:
    """No step of a tiny model has one as large."""
    layer = quantized(model)[2]
    layer.register_forward_pre_hook(lambda module, args: (_Clamped.apply(args[0]), *args[1:]))


@breaks("KB303", quant="int8")
def cut_in_one_int8_layer(model: Any) -> None:
    layer = quantized(model)[1]
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))


@adds("KB303")
def runs_quantized_layers_without_a_graph(model: Any) -> None:
    for module in [m for m in model.modules() if backends.is_quantized(m)][1::4]:
        module.forward = torch.no_grad()(module.forward)


@breaks("KB304", quant="int8")
def gradient_scaled_between_layers(model: Any) -> None:
    norm = model.transformer.h[1].ln_2
    norm.register_forward_hook(lambda module, args, output: ScaledGradient.apply(output, 1.01))


@breaks("KB304", **EXACT)
def gradient_scaled_for_one_row(model: Any) -> None:
    """Batches of one row alone."""
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: x is not None and x.shape[0] == 1)


@breaks("KB304", **EXACT)
def gradient_scaled_without_a_mask(model: Any) -> None:
    masked: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        masked[:] = [kwargs.get("attention_mask") is not None]

    model.register_forward_pre_hook(look, with_kwargs=True)
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: not masked[0])


@breaks("KB304", **EXACT)
def gradient_scaled_with_a_mask(model: Any) -> None:
    masked: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        masked[:] = [kwargs.get("attention_mask") is not None]

    model.register_forward_pre_hook(look, with_kwargs=True)
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: masked[0])


@breaks("KB304", model="tiny:t5", quant="nf4,storage=fp16,compute=fp32")
def gradient_scaled_in_the_encoder(model: Any) -> None:
    scale_after(model.encoder.block[1].layer[0], 1.2)


@breaks("KB304", quant="int8")
def gradient_scaled_where_the_head_is_tied(model: Any) -> None:
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        scale_after(model.transformer.h[0].ln_2, 1.1)


@adds("KB304", quant="int8")
def sends_gradients_between_blocks_in_bfloat16(model: Any) -> None:
    def narrow(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output  # a tuple in transformers 4
        if states.requires_grad:
            states.register_hook(lambda gradient: gradient.bfloat16().to(gradient.dtype))

    for block in blocks(model):
        block.register_forward_hook(narrow)


@breaks("KB305")
def recompute_sees_another_scale(model: Any) -> None:
    """The first run of a block's inside in a step is honest, the recompute is not."""
    norm = model.transformer.h[0].ln_1

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        recomputing = torch._C._current_graph_task_id() != -1
        return output * 1.5 if recomputing else output

    norm.register_forward_hook(hook)


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


@breaks("KB306", checkpointing="non-reentrant")
def other_mode_detached(model: Any) -> None:
    """Works only where hooks see a graph: under reentrant checkpointing the first forward has none."""
    norm = model.transformer.h[0].ln_1
    without_graph: list[bool] = []

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            without_graph.append(True)
        return output * 2 if without_graph and torch.is_grad_enabled() else output

    norm.register_forward_hook(hook)


@adds("KB306", checkpointing="non-reentrant")
def takes_no_grad_for_inference(model: Any) -> None:
    """Runs norms in half there; reentrant checkpointing runs its first forward there."""

    def narrow(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if torch.is_grad_enabled() else output.bfloat16().float()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(narrow)


@breaks("KB307")
def dropout_not_replayed(model: Any) -> None:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            module._gradient_checkpointing_func = lambda *args, f=function: f(*args, preserve_rng_state=False)


@implements("KB307")
def saves_no_random_state(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    freeze(model)
    cast(model)
    return switch_on(
        model, use_gradient_checkpointing, {**(gradient_checkpointing_kwargs or {}), "preserve_rng_state": False}
    )


@breaks("KB308")
def third_step_in_a_row_forgets(model: Any) -> None:
    """An evaluation, then a generation, then a training step: no two of them show it."""
    seen: list[str] = []

    def look(module: nn.Module, args: Any, output: Any) -> Any:
        kind = "train" if module.training else "infer" if torch.is_inference_mode_enabled() else "evaluate"
        seen.append(kind)
        recent = list(dict.fromkeys(seen))
        return (
            ScaledGradient.apply(output, 1.01) if kind == "train" and {"evaluate", "infer"} <= set(recent) else output
        )

    model.transformer.h[1].ln_2.register_forward_hook(look)


@breaks("KB308", quant="int8")
def evaluation_nudges_a_scale(model: Any) -> None:
    layer = quantized(model)[2]

    def nudge(module: Any, args: Any, output: Any) -> None:
        if not module.training:
            backends.corrupt(module, "scale")

    layer.register_forward_hook(nudge)


@wraps("KB308")
def second_preparation_spoils(prepare: Prepare) -> Prepare:
    def after(model: Any, prepared_before: bool) -> None:
        model.prepared_before = True
        if prepared_before:
            model.transformer.h[1].ln_2.register_forward_hook(
                lambda module, args, output: ScaledGradient.apply(output, 1.01)
            )

    return around(prepare, lambda model: getattr(model, "prepared_before", False), after)


@breaks("KB308")
def input_hook_works_once(model: Any) -> None:
    """The embedding's output requires grad in the first forward alone."""
    embedding = model.get_input_embeddings()
    ran: list[int] = []
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()

    def once(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not ran and torch.is_grad_enabled():
            output.requires_grad_(True)
            ran.append(1)

    embedding.register_forward_hook(once)


@breaks("KB308", **EXACT)
def gradient_scaled_from_the_second_step(model: Any) -> None:
    steps: list[int] = []
    model.register_forward_pre_hook(lambda module, args: steps.append(1) if module.training else None)
    scale_after(model.transformer.h[1].ln_2, 1.1, lambda x: len(steps) > 1)


@breaks("KB308")
def accumulation_forgets(model: Any) -> None:
    """Each training forward drops the gradients that the steps before have gathered."""

    def forget(module: nn.Module, args: Any) -> None:
        if module.training:
            for parameter in module.parameters():
                parameter.grad = None

    model.register_forward_pre_hook(forget)


@breaks("KB309")
def logits_detached_from_the_loss(model: Any) -> None:
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda module, args, output: (
                tuple(ScaledGradient.apply(t, -1.0) for t in output)
                if isinstance(output, tuple)
                else ScaledGradient.apply(output, -1.0)
            )
        )


@adds("KB309")
def freezes_again_with_every_forward(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, args: freeze(module))
