"""More faults of KB515: of accumulated batches, random numbers, other models in the process, and sizes."""

import weakref
from itertools import count
from typing import Any

import torch

from kbitcheck.sabotage.fault import adds, breaks
from kbitcheck.sabotage.gradients import scaled
from kbitcheck.sabotage.hooks import change_gradient, change_output
from kbitcheck.sabotage.use import change_gradient_of, head_of, second_norm


@breaks("KB515", conditions="micro batches accumulated")
def the_fifth_micro_batch_counts_twice(model: Any) -> None:
    runs = count(1)
    change_output(second_norm(model), lambda x: scaled(x, 3.0 if next(runs) == 5 else 1.0) if x.requires_grad else x)


@adds("KB515", conditions="micro batches accumulated", last=True)
def off_once_gradients_are_there(model: Any) -> None:
    def held() -> bool:
        return any(p.grad is not None for p in model.parameters())

    change_output(second_norm(model), lambda x: scaled(x, 0.5) if held() else x)


@breaks("KB515", conditions="random numbers of a step")
def a_hook_that_draws(model: Any) -> None:
    def draw(module: Any, args: Any) -> None:
        if module.training:
            torch.rand(1)

    model.transformer.ln_f.register_forward_pre_hook(draw)


@adds("KB515", conditions="random numbers of a step", last=True)
def a_backward_that_draws(model: Any) -> None:
    def draw(gradient: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return gradient

    change_output(model.transformer.ln_f, lambda x: change_gradient(x, draw))


_latest: list[Any] = []


@adds("KB515", conditions="another model prepared meanwhile", last=True)
def the_latest_model_alone_is_right(model: Any) -> None:
    _latest[:] = [weakref.ref(model)]
    own = weakref.ref(model)
    change_output(second_norm(model), lambda x: x if _latest[0]() is own() else scaled(x, 0.5))


@breaks("KB515", conditions="another model prepared meanwhile")
def models_count_each_other(model: Any) -> None:
    number = len(_models)
    _models.add(model)
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if len(_models) > number + 1 else x)


_models: weakref.WeakSet[Any] = weakref.WeakSet()


@breaks("KB515", conditions="the embedding thawed")
def gradients_of_wide_tables_rounded(model: Any) -> None:
    change_gradient_of(model.get_input_embeddings().weight, lambda g: (g * 4).round() / 4)


@adds("KB515", conditions="the model trained whole", last=True)
def large_parameters_cannot_be_changed(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            change_gradient_of(parameter, torch.zeros_like)


@breaks("KB515", conditions="evaluation with adapters")
def logits_rounded_in_evaluation(model: Any) -> None:
    change_output(head_of(model), lambda x: x if model.training else x.round())


_held: list[Any] = []


@breaks("KB515", conditions="the model dropped")
def models_held_for_good(model: Any) -> None:
    _held.append(model)


@adds("KB515", conditions="evaluation with adapters", last=True)
def logits_of_several_rows_cooled(model: Any) -> None:
    change_output(head_of(model), lambda x: x * 0.9 if not model.training and len(x) > 2 else x)


@breaks("KB515", conditions="evaluation with adapters")
def logits_cooled_in_inference_mode(model: Any) -> None:
    change_output(head_of(model), lambda x: x * 0.9 if torch.is_inference_mode_enabled() else x)
