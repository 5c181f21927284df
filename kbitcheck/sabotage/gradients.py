"""Faults of KB3xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.fault import Prepare, around, breaks, wraps
from kbitcheck.sabotage.precision import quantized


@breaks("KB301")
def input_hooks_removed(model: Any) -> None:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


@breaks("KB302", checkpointing="non-reentrant")
def first_blocks_cut_off(model: Any) -> None:
    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(t.detach() for t in output) if isinstance(output, tuple) else output.detach()

    model.transformer.h[1].register_forward_hook(cut)


@breaks("KB303")
def cut_hidden_by_the_residual_stream(model: Any) -> None:
    layer = quantized(model)[2]
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


@breaks("KB303", model="tiny:llama", quant="int8")
def gradient_scaled_in_one_layer(model: Any) -> None:
    layer = quantized(model)[4]
    layer.register_forward_pre_hook(lambda module, args: (_Scaled.apply(args[0], 1.02), *args[1:]))


@breaks("KB304", quant="int8")
def gradient_scaled_between_layers(model: Any) -> None:
    norm = model.transformer.h[1].ln_2
    norm.register_forward_hook(lambda module, args, output: _Scaled.apply(output, 1.01))


@breaks("KB305")
def recompute_sees_another_scale(model: Any) -> None:
    """The first run of a block's inside in a step is honest, the recompute is not."""
    norm = model.transformer.h[0].ln_1

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        recomputing = torch._C._current_graph_task_id() != -1
        return output * 1.5 if recomputing else output

    norm.register_forward_hook(hook)


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


@breaks("KB307")
def dropout_not_replayed(model: Any) -> None:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            module._gradient_checkpointing_func = lambda *args, f=function: f(*args, preserve_rng_state=False)


@breaks("KB309")
def logits_detached_from_the_loss(model: Any) -> None:
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda module, args, output: (
                tuple(_Scaled.apply(t, -1.0) for t in output)
                if isinstance(output, tuple)
                else _Scaled.apply(output, -1.0)
            )
        )


@breaks("KB308")
def third_step_in_a_row_forgets(model: Any) -> None:
    """An evaluation, then a generation, then a training step: no two of them show it."""
    seen: list[str] = []

    def look(module: nn.Module, args: Any, output: Any) -> Any:
        kind = "train" if module.training else "infer" if torch.is_inference_mode_enabled() else "evaluate"
        seen.append(kind)
        recent = list(dict.fromkeys(seen))
        return _Scaled.apply(output, 1.01) if kind == "train" and {"evaluate", "infer"} <= set(recent) else output

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
            model.transformer.h[1].ln_2.register_forward_hook(lambda module, args, output: _Scaled.apply(output, 1.01))

    return around(prepare, lambda model: getattr(model, "prepared_before", False), after)
