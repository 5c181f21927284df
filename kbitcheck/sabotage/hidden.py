"""Faults that hide: they show in one quantization, tower, shape, mode or step alone, or in no output at all."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.checkpointing import blocks
from kbitcheck.sabotage.fault import Prepare, around, breaks, wraps
from kbitcheck.sabotage.gradients import _Scaled
from kbitcheck.sabotage.precision import quantized
from kbitcheck.sabotage.switches import subclass

EXACT = {"model": "tiny:gpt2", "quant": "nf4,compute=fp32"}


def scale_after(module: nn.Module, factor: float, when: Any = lambda args: True) -> None:
    """Scale the gradient that comes back through a module, on the calls that ``when`` picks by their first input."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not when(args[0] if args else None):
            return output
        if isinstance(output, tuple):
            return (_Scaled.apply(output[0], factor), *output[1:])
        return _Scaled.apply(output, factor)

    module.register_forward_hook(hook)


@breaks("KB304", **EXACT)
def gradient_scaled_for_one_row(model: Any) -> None:
    """Batches of one row alone."""
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: x is not None and x.shape[0] == 1)


@breaks("KB304", **EXACT)
def gradient_scaled_without_a_mask(model: Any) -> None:
    given: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = [kwargs.get("attention_mask") is not None]

    model.register_forward_pre_hook(look, with_kwargs=True)
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: not given[0])


@breaks("KB304", **EXACT)
def gradient_scaled_with_a_mask(model: Any) -> None:
    given: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = [kwargs.get("attention_mask") is not None]

    model.register_forward_pre_hook(look, with_kwargs=True)
    scale_after(model.transformer.h[1].ln_2, 1.05, lambda x: given[0])


@breaks("KB304", model="tiny:t5", quant="nf4,storage=fp16,compute=fp32")
def gradient_scaled_in_the_encoder(model: Any) -> None:
    scale_after(model.encoder.block[1].layer[0], 1.2)


@breaks("KB304", quant="int8")
def gradient_scaled_where_the_head_is_tied(model: Any) -> None:
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        scale_after(model.transformer.h[0].ln_2, 1.1)


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


@breaks("KB204", alone=True)
def epsilon_moved_by_a_hundredth(model: Any) -> None:
    model.transformer.ln_f.eps = 1.01e-5  # however often it is called: another rule tells of what is not idempotent


@breaks("KB103")
def zero_gradients_left_on_the_base(model: Any) -> None:
    norm = model.transformer.ln_f.weight
    norm.grad = torch.zeros_like(norm)


@breaks("KB508")
def evaluations_hoarded(model: Any) -> None:
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not module.training and not torch.is_inference_mode_enabled():
            kept.append(output.logits.detach())

    model.register_forward_hook(keep)


@wraps("KB502", alone=True)
def a_copy_returned_when_checkpointing_is_off(prepare: Prepare) -> Prepare:
    import copy

    def prepare_model(
        model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
    ) -> Any:
        given = model if use_gradient_checkpointing else copy.deepcopy(model)
        return prepare(given, use_gradient_checkpointing, gradient_checkpointing_kwargs)

    return prepare_model


@wraps("KB507", alone=True)
def logging_turned_down(prepare: Prepare) -> Prepare:
    def turn(model: Any) -> None:
        log = logging.getLogger("accelerate")
        log.setLevel(log.level + 1)

    return around(prepare, turn, lambda model, token: None)


@breaks("KB405", model="tiny:llama", quant="nf4", checkpointing="reentrant")
def outputs_of_quantized_layers_kept(model: Any) -> None:
    kept: list[Any] = []
    for block in blocks(model):
        for inner in block.modules():
            if backends.is_quantized(inner):
                inner.register_forward_hook(lambda module, args, output: kept.append(output))
    model.register_forward_pre_hook(lambda module, args: kept.clear())


@breaks("KB206", model="tiny:t5", quant="int8", checkpointing="non-reentrant")
def a_row_scale_off_in_the_encoder(model: Any) -> None:
    layer: Any = next(m for n, m in model.named_modules() if backends.is_quantized(m) and n.startswith("encoder"))
    backends.corrupt(layer, "scale", 1.001)


@breaks("KB203", model="tiny:t5", quant="int8", checkpointing="non-reentrant")
def norms_rounded_through_bfloat16(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__ == "T5LayerNorm":
            module.weight.data = module.weight.data.bfloat16().float()


@breaks("KB207", model="tiny:llama", quant="int8")
def last_layer_dequantized(model: Any) -> None:
    name, layer = [(n, m) for n, m in model.named_modules() if backends.is_quantized(m)][-1]
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(backends.unpacked(layer), requires_grad=False)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, plain)


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


@breaks("KB209")
def decodes_wrongly(model: Any) -> None:
    """With a cache, where one token comes in at a time, alone."""
    norm = model.transformer.ln_f
    norm.register_forward_hook(lambda module, args, output: output.flip(-1) if output.shape[1] == 1 else output)


@breaks("KB210")
def embeddings_of_ones_own_get_no_gradient(model: Any) -> None:
    def look(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = kwargs.get("inputs_embeds")
        return args, kwargs if given is None else {**kwargs, "inputs_embeds": given.detach()}

    model.register_forward_pre_hook(look, with_kwargs=True)


@breaks("KB209")
def padding_in_front_is_read(model: Any) -> None:
    def look(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask[:, 0].all():
            kwargs = {**kwargs, "attention_mask": None}
        return args, kwargs

    model.register_forward_pre_hook(look, with_kwargs=True)


@breaks("KB303", quant="int8")
def cut_in_one_int8_layer(model: Any) -> None:
    layer = quantized(model)[1]
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))


@breaks("KB402", checkpointing="off")
def flags_switched_on_afterwards(model: Any) -> None:
    for block in blocks(model)[1:]:
        block.gradient_checkpointing = True


@breaks("KB501")
def a_model_that_cannot_be_left_off(model: Any) -> None:
    for block in blocks(model):
        block.gradient_checkpointing = True


@breaks("KB502", alone=True)
def a_class_swapped(model: Any) -> None:
    subclass(model)


@breaks("KB308")
def accumulation_forgets(model: Any) -> None:
    """Each training forward drops the gradients that the steps before have gathered."""

    def forget(module: nn.Module, args: Any) -> None:
        if module.training:
            for parameter in module.parameters():
                parameter.grad = None

    model.register_forward_pre_hook(forget)
