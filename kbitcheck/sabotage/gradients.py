"""Faults of KB3xx."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kbitcheck.observe.internals import checkpoint_function, set_checkpoint_function
from kbitcheck.sabotage.fault import Prepare, adds, breaks, implements, wraps
from kbitcheck.sabotage.helpers import blocks, corrupt, prepare_well, quantized
from kbitcheck.sabotage.hooks import before_forward, change_gradient, change_input, change_output

EXACT = {"model": "tiny:gpt2", "quant": "nf4,compute=fp32"}


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x`` itself, with its gradient multiplied by ``factor``."""
    return change_gradient(x, lambda gradient: gradient * factor)


def scale_after(module: nn.Module, factor: float, when: Callable[[Any], bool] = lambda x: True) -> None:
    """Scale the gradient that comes back through a module, on the calls whose output ``when`` picks."""
    change_output(module, lambda x: scaled(x, factor) if when(x) else x)


def remove_hooks(model: Any) -> None:
    """Remove every forward hook and forward pre-hook."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def _scale_by_mask(model: Any, *, masked: bool) -> None:
    """Scale gradients in the steps with an attention mask, or in those without."""
    present: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        present[:] = [kwargs.get("attention_mask") is not None]

    model.register_forward_pre_hook(look, with_kwargs=True)
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: present[0] is masked)


@breaks("KB301")
def input_hooks_removed(model: Any) -> None:
    remove_hooks(model)


@implements("KB301")
def checkpoints_without_input_hooks(model: Any, checkpointing: bool, kwargs: Any) -> None:
    prepare_well(model, checkpointing, kwargs)
    if checkpointing:
        model.disable_input_require_grads()


@breaks("KB302", checkpointing="non-reentrant")
def first_blocks_cut_off(model: Any) -> None:
    change_output(model.transformer.h[1], torch.Tensor.detach)


@adds("KB302", last=True, model="tiny:llava", quant="fp4")
def hooks_the_text_embedding_alone(model: Any) -> None:
    for name, module in model.named_modules():
        if "vision" in name:
            module._forward_hooks.clear()


@breaks("KB303")
def cut_hidden_by_the_residual_stream(model: Any) -> None:
    change_input(quantized(model)[2], torch.Tensor.detach)


@breaks("KB303", model="tiny:llama", quant="int8")
def gradient_scaled_in_one_layer(model: Any) -> None:
    change_input(quantized(model)[4], lambda x: scaled(x, 1.02))


@breaks("KB303")
def large_gradients_clamped(model: Any) -> None:
    """Clamps gradients that are larger than those in any step of a tiny model."""
    change_input(quantized(model)[2], lambda x: change_gradient(x, lambda g: g.nan_to_num().clamp(-1, 1)))


@breaks("KB303")
def gradient_scaled_by_a_hook_on_an_output(model: Any) -> None:
    """The layer itself hooks the tensor that it returns."""
    layer = quantized(model)[1]
    run = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = run(x)
        if output.requires_grad:
            output.register_hook(lambda gradient: 1.05 * gradient)
        return output

    layer.forward = forward


@breaks("KB303", quant="int8")
def gradient_scaled_by_a_hook_on_an_input(model: Any) -> None:
    """The layer itself hooks the tensor that it takes."""
    layer = quantized(model)[1]
    run = layer.forward

    def forward(x: torch.Tensor) -> Any:
        if x.requires_grad:
            x.register_hook(lambda gradient: 1.05 * gradient)
        return run(x)

    layer.forward = forward


@breaks("KB303", quant="int8")
def cut_in_one_int8_layer(model: Any) -> None:
    change_input(quantized(model)[1], torch.Tensor.detach)


@adds("KB303")
def runs_quantized_layers_without_a_graph(model: Any) -> None:
    for layer in quantized(model)[1::4]:
        layer.forward = torch.no_grad()(layer.forward)


@breaks("KB304", quant="int8")
def gradient_scaled_between_layers(model: Any) -> None:
    scale_after(model.transformer.h[1].ln_2, 1.01)


@breaks("KB304", **EXACT)
def gradient_scaled_for_one_row(model: Any) -> None:
    """Only in batches of one row."""
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: x.shape[0] == 1)


@breaks("KB304", **EXACT)
def gradient_scaled_without_a_mask(model: Any) -> None:
    _scale_by_mask(model, masked=False)


@breaks("KB304", **EXACT)
def gradient_scaled_with_a_mask(model: Any) -> None:
    _scale_by_mask(model, masked=True)


@breaks("KB304", model="tiny:t5", quant="nf4,storage=fp16,compute=fp32")
def gradient_scaled_in_the_encoder(model: Any) -> None:
    scale_after(model.encoder.block[1].layer[0], 1.2)


@breaks("KB304", quant="int8")
def gradient_scaled_where_the_head_is_tied(model: Any) -> None:
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        scale_after(model.transformer.h[0].ln_2, 1.1)


@adds("KB304", quant="int8")
def sends_gradients_between_blocks_in_bfloat16(model: Any) -> None:
    for block in blocks(model):
        change_output(block, lambda x: change_gradient(x, lambda gradient: gradient.bfloat16().to(gradient.dtype)))


@breaks("KB305")
def recompute_sees_another_scale(model: Any) -> None:
    """The forward computes what it should, the recompute does not."""
    change_output(model.transformer.h[0].ln_1, lambda x: x * 1.5 if torch._C._current_graph_task_id() != -1 else x)


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
        set_checkpoint_function(block, _stashing)


@breaks("KB306", checkpointing="non-reentrant")
def other_mode_detached(model: Any) -> None:
    """Changes the recompute only under reentrant checkpointing, whose first forward records no graph."""
    without_graph: list[bool] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            without_graph.append(True)
        return x * 2 if without_graph and torch.is_grad_enabled() else x

    change_output(model.transformer.h[0].ln_1, double)


@adds("KB306", checkpointing="non-reentrant")
def takes_no_grad_for_inference(model: Any) -> None:
    """Runs norms in bfloat16 without grad, where the first forward of reentrant checkpointing runs too."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            change_output(module, lambda x: x if torch.is_grad_enabled() else x.bfloat16().float())


@breaks("KB307")
def dropout_not_replayed(model: Any) -> None:
    for module in model.modules():
        if (function := checkpoint_function(module)) is not None:
            set_checkpoint_function(module, partial(function, preserve_rng_state=False))


@implements("KB307")
def saves_no_random_state(model: Any, checkpointing: bool, kwargs: Any) -> None:
    prepare_well(model, checkpointing, {**(kwargs or {}), "preserve_rng_state": False})


@breaks("KB308")
def third_step_in_a_row_forgets(model: Any) -> None:
    """Shows only in a training step that follows both an evaluation and a generation."""
    modes: set[str] = set()

    def look(module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training:
            modes.add("generate" if torch.is_inference_mode_enabled() else "evaluate")
        return scaled(output, 1.01) if module.training and len(modes) == 2 else output

    model.transformer.h[1].ln_2.register_forward_hook(look)


@breaks("KB308", quant="int8")
def evaluation_nudges_a_scale(model: Any) -> None:
    def nudge(module: Any, args: Any, output: Any) -> None:
        if not module.training:
            corrupt(module, "scale")

    quantized(model)[2].register_forward_hook(nudge)


@wraps("KB308")
def second_preparation_spoils(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    prepare(model, *arguments)
    if getattr(model, "prepared_before", False):
        scale_after(model.transformer.h[1].ln_2, 1.01)
    model.prepared_before = True
    return model


@breaks("KB308")
def input_hook_works_once(model: Any) -> None:
    """Only in the first forward does the embedding's output require grad."""
    ran: list[int] = []
    remove_hooks(model)

    def once(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not ran and torch.is_grad_enabled():
            output.requires_grad_(True)
            ran.append(1)

    model.get_input_embeddings().register_forward_hook(once)


@breaks("KB308", **EXACT)
def gradient_scaled_from_the_second_step(model: Any) -> None:
    steps: list[int] = []
    model.register_forward_pre_hook(lambda module, args: steps.append(1) if module.training else None)
    scale_after(model.transformer.h[1].ln_2, 1.1, lambda x: len(steps) > 1)


@breaks("KB308")
def accumulation_forgets(model: Any) -> None:
    """Each training forward drops the gradients that earlier steps accumulated."""

    def forget(module: nn.Module, args: Any) -> None:
        if module.training:
            for parameter in module.parameters():
                parameter.grad = None

    model.register_forward_pre_hook(forget)


@breaks("KB309")
def logits_detached_from_the_loss(model: Any) -> None:
    for block in model.transformer.h:
        scale_after(block, -1.0)


@adds("KB309")
def freezes_again_with_every_forward(model: Any) -> None:
    before_forward(model, lambda module: module.requires_grad_(False))
