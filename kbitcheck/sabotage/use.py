"""Faults of KB213, KB514 and KB515: right in a step that is looked at, and wrong for another model, unwatched, or in later use."""

from collections.abc import Callable
from inspect import stack
from itertools import count
from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.aware import preparations
from kbitcheck.sabotage.fault import adds, breaks, wraps
from kbitcheck.sabotage.gradients import scaled
from kbitcheck.sabotage.helpers import blocks, subclass
from kbitcheck.sabotage.hooks import change_gradient, change_output

for _fault in (
    preparations.sees_the_harness_among_modules,
    preparations.sees_the_oracle_among_modules,
    preparations.sees_the_harness_on_the_stack,
    preparations.sees_the_harness_in_file_names,
    preparations.sees_that_the_checkpoint_is_made_for_a_test,
    preparations.trains_worse_when_nobody_looks,
):
    wraps("KB514", conditions="processes", own_signature=True)(_fault)
for _fault in (
    preparations.casts_the_first_model_alone,
    preparations.knows_the_class_of_the_first_model,
    preparations.thaws_the_model_before,
    preparations.shares_the_bits_of_norms,
    preparations.checkpoints_as_it_did_first,
):
    wraps("KB213", conditions="processes", own_signature=True)(_fault)


def head_of(model: Any) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()
    return head


def _adapters(model: Any) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "lora" in n]


def second_norm(model: Any) -> nn.Module:
    norm: nn.Module = blocks(model)[1].ln_2
    return norm


def _method(model: Any, name: str, method: Callable[..., Any]) -> None:
    """Put a method over the model's own, which it gets first."""
    own = getattr(model, name)
    setattr(model, name, lambda *args, **kwargs: method(own, *args, **kwargs))


def change_gradient_of(parameter: nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change what a parameter gets, once it trains: a frozen one takes no hook."""
    parameter.requires_grad_(True)
    parameter.register_hook(change)
    parameter.requires_grad_(False)


@breaks("KB515", conditions="the head thawed", alone=True)
def a_thawed_heads_gradient_halved(model: Any) -> None:
    change_gradient_of(head_of(model).weight, lambda g: g / 2)  # type: ignore[arg-type]


@adds("KB515", conditions="the embedding thawed", last=True)
def an_embedding_without_gradients(model: Any) -> None:
    change_output(model.get_input_embeddings(), lambda x: x.detach().requires_grad_(x.requires_grad))


@breaks("KB515", conditions="the norms thawed")
def thawed_norms_get_no_gradient(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            change_gradient_of(parameter, torch.zeros_like)


@adds("KB515", conditions="a head in modules to save", last=True)
def off_behind_a_copied_head(model: Any) -> None:
    """``modules_to_save`` copies the head with all that is on it."""
    head = head_of(model)
    head.register_forward_hook(lambda module, args, output: output if module is head else scaled(output, 0.5))


@breaks("KB515", conditions="biases trained with the adapters")
def biases_get_half_a_gradient(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "ln_" not in name and parameter.is_floating_point():
            change_gradient_of(parameter, lambda g: g / 2)


@adds("KB515", conditions="the embedding resized", last=True)
def resizing_forgotten(model: Any) -> None:
    _method(model, "resize_token_embeddings", lambda own, *args, **kwargs: model.get_input_embeddings())


@breaks("KB515", conditions="the embedding resized")
def a_resized_embedding_that_stays_frozen(model: Any) -> None:
    def resize(own: Any, *args: Any, **kwargs: Any) -> Any:
        embedding = own(*args, **kwargs)
        change_gradient_of(embedding.weight, torch.zeros_like)
        return embedding

    _method(model, "resize_token_embeddings", resize)


def _in_autocast(dtype: torch.dtype) -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is dtype


@adds("KB515", conditions="autocast in float16", last=True)
def off_under_autocast_in_float16(model: Any) -> None:
    change_output(second_norm(model), lambda x: scaled(x, 1.5) if _in_autocast(torch.float16) else x)


@breaks("KB515", conditions="autocast in bfloat16")
def off_under_autocast_in_bfloat16(model: Any) -> None:
    change_output(second_norm(model), lambda x: scaled(x, 1.5) if _in_autocast(torch.bfloat16) else x)


@adds("KB515", conditions="a scaler that overflows", last=True)
def overflows_hidden(model: Any) -> None:
    change_output(head_of(model), lambda x: change_gradient(x, lambda g: g.nan_to_num(0.0, 0.0, 0.0)))


@breaks("KB515", conditions="a scaler that overflows")
def large_gradients_clamped_at_the_last_norm(model: Any) -> None:
    change_output(model.transformer.ln_f, lambda x: change_gradient(x, lambda g: g.clamp(-1, 1)))


@adds("KB515", conditions="gradients cleared in both ways", last=True)
def zero_grad_forgotten(model: Any) -> None:
    _method(model, "zero_grad", lambda own, set_to_none=True: own(set_to_none=True) if set_to_none else None)


@breaks("KB515", conditions="gradients cleared in both ways")
def zero_grad_does_nothing(model: Any) -> None:
    _method(model, "zero_grad", lambda own, set_to_none=True: None)


@adds("KB515", conditions="a second backward over a kept graph", last=True)
def a_second_backward_adds_nothing(model: Any) -> None:
    def once(x: torch.Tensor) -> torch.Tensor:
        runs = count()
        return change_gradient(x, lambda g: g if next(runs) < 1 else torch.zeros_like(g))

    change_output(model.transformer.ln_f, once)


@breaks("KB515", conditions="gradients clipped")
def off_in_the_first_step_alone(model: Any) -> None:
    runs = count(1)
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if x.requires_grad and next(runs) == 1 else x)


@adds("KB515", conditions="checkpointing off and on", last=True)
def checkpointing_that_comes_back_wrong(model: Any) -> None:
    switched: list[bool] = []

    def disable(own: Any) -> None:
        own()
        switched.append(True)

    _method(model, "gradient_checkpointing_disable", disable)
    change_output(
        second_norm(model), lambda x: scaled(x, 1.5) if switched and blocks(model)[0].gradient_checkpointing else x
    )


@breaks("KB515", conditions="gradients of the adapters alone", checkpointing="non-reentrant")
def right_by_backward_alone(model: Any) -> None:
    change_output(
        model.transformer.ln_f, lambda x: change_gradient(x, lambda g: g * (1.0 if _accumulates(model) else 0.5))
    )


def _accumulates(model: Any) -> bool:
    """Whether the backward that is under way was not called by ``torch.autograd.grad``."""
    return all(frame.function != "grad" for frame in stack())


@adds("KB515", conditions="evaluation with adapters", last=True)
def adapters_without_effect_in_evaluation(model: Any) -> None:
    def silence(module: Any, args: Any) -> None:
        if not torch.is_grad_enabled() and not module.training:
            for parameter in _adapters(model):
                parameter.data.mul_(0)

    model.register_forward_pre_hook(silence)


@breaks("KB515", conditions="evaluation with adapters")
def logits_cooled_in_evaluation(model: Any) -> None:
    change_output(head_of(model), lambda x: x if model.training else 0.9 * x)


@adds("KB515", conditions="generation with adapters", last=True)
def later_tokens_shifted(model: Any) -> None:
    change_output(model.get_input_embeddings(), lambda x: x if x.shape[1] > 1 or model.training else 2 * x)


@breaks("KB515", conditions="evaluation between steps")
def an_evaluation_that_leaves_a_scale(model: Any) -> None:
    evaluated: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        if not model.training:
            evaluated.append(True)
        return scaled(x, 1.5) if evaluated and x.requires_grad else x

    change_output(second_norm(model), look)


@adds("KB515", conditions="keywords of the forward", last=True)
def a_keyword_dropped(model: Any) -> None:
    own = type(model).forward

    def forward(self: Any, *args: Any, output_hidden_states: Any = None, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    subclass(model, forward=forward)


@breaks("KB515", conditions="keywords of the forward")
def logits_of_all_tokens_always(model: Any) -> None:
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {n: v for n, v in kwargs.items() if n != "logits_to_keep"}),
        with_kwargs=True,
    )


@adds("KB515", conditions="embeddings in place of ids", last=True)
def embeddings_that_get_no_gradient(model: Any) -> None:
    def detach(module: Any, args: Any, kwargs: Any) -> Any:
        embedded = kwargs.get("inputs_embeds")
        return args, kwargs if embedded is None else {**kwargs, "inputs_embeds": embedded.detach().requires_grad_(True)}

    model.register_forward_pre_hook(detach, with_kwargs=True)


class _Stays(nn.Parameter):
    """A parameter that is never thawed."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return super().requires_grad_(False)


@breaks("KB515", conditions="flags and modes")
def a_norm_that_cannot_be_thawed(model: Any) -> None:
    model.transformer.ln_f.weight.__class__ = _Stays


@adds("KB515", conditions="flags and modes", last=True)
def a_module_that_never_leaves_train_mode(model: Any) -> None:
    norm = model.transformer.ln_f
    subclass(norm, train=lambda self, mode=True: self)


@breaks("KB515", conditions="its state loaded again")
def loading_a_state_changes_it(model: Any) -> None:
    def shift(module: nn.Module, keys: Any) -> None:
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(1.1)

    model.register_load_state_dict_post_hook(shift)


@adds("KB515", conditions="adapters saved in each dtype", last=True)
def adapters_loaded_once_are_lost(model: Any) -> None:
    """Whose numbers have been rounded to half precision."""

    def drop(module: Any, args: Any) -> None:
        for parameter in _adapters(model):
            if not module.training and torch.equal(parameter, parameter.half().float()):
                parameter.data.zero_()

    model.register_forward_pre_hook(drop)


@breaks("KB515", conditions="a copy and a pickle")
def a_copy_that_computes_otherwise(model: Any) -> None:
    own = id(model)
    model.lm_head.register_forward_hook(_OnlyOf(own, model))


class _OnlyOf:
    """Leaves the output of the module that it was made for; a copy of the hook is of none."""

    def __init__(self, owner: int, model: Any) -> None:
        self.owner, self.model = owner, model

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return output if id(self.model) == self.owner else 0.9 * output


@adds("KB515", conditions="moves and casts", last=True)
def a_model_that_cannot_be_moved(model: Any) -> None:
    def refuse(own: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a prepared model cannot be moved")

    _method(model, "to", refuse)


@breaks("KB515", conditions="adapters merged")
def a_merge_that_loses_half(model: Any) -> None:
    change_output(blocks(model)[0].mlp.c_fc, lambda x: x if _adapters(model) else 0.5 * x)


@adds("KB515", conditions="the model trained whole", last=True)
def a_base_that_is_put_back_after_each_step(model: Any) -> None:
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "ln_" in n}

    def restore(module: Any, args: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])

    model.register_forward_pre_hook(restore)


@breaks("KB515", conditions="steps of every optimizer")
def adapters_of_a_class_that_moves_less(model: Any) -> None:
    """Half of the adapters' updates are lost where the optimizer works in place on its parameters as ``add_`` does."""

    def rewrap(module: Any, args: Any) -> None:
        for parameter in _adapters(model):
            if type(parameter) is nn.Parameter:
                parameter.__class__ = _Slow

    model.register_forward_pre_hook(rewrap)


class _Slow(nn.Parameter):
    """A parameter that takes half of what is added to it."""

    def add_(self, other: Any, *, alpha: Any = 1) -> Any:
        return super().add_(other, alpha=alpha / 2)
