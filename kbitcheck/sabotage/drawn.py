"""Faults of KB310 to KB312: each is right under the conditions that everybody looks at."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import count
from typing import Any

import torch
from torch import nn

from kbitcheck.models.inputs.text import IGNORED
from kbitcheck.observe.internals import backward_runs
from kbitcheck.observe.probes.routers import routers
from kbitcheck.sabotage.fault import adds, breaks
from kbitcheck.sabotage.gradients import scale_after, scaled
from kbitcheck.sabotage.helpers import blocks
from kbitcheck.sabotage.hooks import change_gradient, change_input, change_output


def _only(model: Any, when: Callable[[torch.Tensor], bool]) -> None:
    """Have the gradients of the second block be off by a twentieth on the inputs that ``when`` picks."""
    scale_after(model.transformer.h[1].ln_2, 1.05, when)


@breaks("KB310")
def off_beyond_64_tokens(model: Any) -> None:
    _only(model, lambda x: x.shape[1] > 64)


@adds("KB310", last=True)
def off_for_three_rows_or_more(model: Any) -> None:
    _only(model, lambda x: len(x) > 2)


@adds("KB310", last=True)
def off_once_adapters_have_moved(model: Any) -> None:
    """Gradients are off while the adapters have other numbers than at first."""
    first: list[float] = []

    def look(module: nn.Module, args: Any, output: Any) -> Any:
        total = float(sum(p.detach().double().sum() for p in model.parameters() if p.requires_grad))
        first.append(total)
        return scaled(output, 1.05) if total != first[0] else output

    model.transformer.h[1].ln_2.register_forward_hook(look)


def _from_the_eighth_update_on(model: Any) -> None:
    """Have gradients be off once an optimizer has changed the adapters eight times."""
    updates: list[float] = []

    def look(module: nn.Module, args: Any, output: Any) -> Any:
        adapters = [p for p in model.parameters() if p.requires_grad]
        total = float(sum(p.detach().double().sum() for p in adapters))
        if module.training and total not in updates:
            updates.append(total)
        return scaled(output, 1.01) if len(updates) > 8 else output

    model.transformer.h[1].ln_2.register_forward_hook(look)


@breaks("KB311")
def off_after_eight_updates(model: Any) -> None:
    _from_the_eighth_update_on(model)


@adds("KB311", last=True)
def off_from_the_twelfth_step_on(model: Any) -> None:
    steps = count(1)
    change_output(blocks(model)[1].ln_2, lambda x: scaled(x, 1.01) if x.requires_grad and next(steps) > 11 else x)


def _from_the_step(model: Any, number: int, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have the second block's norm return ``act`` of its output from a step's forward on."""
    runs = count(1)
    change_output(blocks(model)[1].ln_2, lambda x: act(x) if x.requires_grad and next(runs) >= number else x)


@breaks("KB310")
def off_for_a_single_long_row_or_a_fourth(model: Any) -> None:
    _only(model, lambda x: (len(x) == 1 and x.shape[1] > 128) or (len(x) > 2 and x.shape[1] > 24))


@breaks("KB310")
def off_for_odd_lengths(model: Any) -> None:
    _only(model, lambda x: x.shape[1] % 2 == 1 and x.shape[1] > 1)


@adds("KB310", last=True)
def off_for_more_than_128_tokens_in_all(model: Any) -> None:
    _only(model, lambda x: x.shape[0] * x.shape[1] > 128)


@adds("KB310", last=True)
def off_for_blocks_of_more_than_64_kilobytes(model: Any) -> None:
    _only(model, lambda x: x.numel() * x.element_size() > 1 << 16)


def _switch(model: Any, on: Callable[[Any], bool]) -> None:
    """Have the blocks checkpoint in the forwards whose arguments ``on`` picks."""
    checkpointed = [block for block in blocks(model) if block.gradient_checkpointing]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        for block in checkpointed:
            block.gradient_checkpointing = on(kwargs)

    model.register_forward_pre_hook(before, with_kwargs=True)


@breaks("KB310")
def as_much_memory_as_ever_beyond_64_tokens(model: Any) -> None:
    _switch(model, lambda kwargs: "input_ids" not in kwargs or kwargs["input_ids"].shape[1] <= 64)


@adds("KB310", conditions="1/9", last=True)
def off_behind_left_padding(model: Any) -> None:
    first: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        first[:] = [mask is None or bool(mask[:, 0].all())]

    model.register_forward_pre_hook(look, with_kwargs=True)
    _only(model, lambda x: not first[0])


def _off_for(model: Any, which: Callable[[Any], bool]) -> None:
    """Have gradients be off in the forwards whose keywords ``which`` picks."""
    passed: list[bool] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: passed.append(which(kwargs)), with_kwargs=True)
    _only(model, lambda x: passed[-1:] == [True])


@adds("KB310", conditions="7/9", last=True)
def off_where_no_label_of_a_row_counts(model: Any) -> None:
    _off_for(model, lambda kwargs: "labels" in kwargs and bool((kwargs["labels"] == IGNORED).all(1).any()))


@breaks("KB310", conditions="4/9")
def off_where_a_row_repeats(model: Any) -> None:
    _off_for(
        model,
        lambda kwargs: "input_ids" in kwargs and len(kwargs["input_ids"].unique(dim=0)) < len(kwargs["input_ids"]),
    )


@adds("KB310", conditions="1/9", last=True)
def off_with_position_ids(model: Any) -> None:
    _off_for(model, lambda kwargs: kwargs.get("position_ids") is not None)


@breaks("KB310", conditions="4/9")
def off_with_hidden_states(model: Any) -> None:
    _off_for(model, lambda kwargs: bool(kwargs.get("output_hidden_states")))


@adds("KB310", conditions="7/9", last=True)
def off_with_a_mask_of_booleans(model: Any) -> None:
    _off_for(model, lambda kwargs: getattr(kwargs.get("attention_mask"), "dtype", None) is torch.bool)


def _trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@adds("KB310", conditions="1/9", last=True)
def off_for_a_rank_above_thirty(model: Any) -> None:
    _only(model, lambda x: any(len(p) > 30 and ".lora_A" in name for name, p in _trained(model).items()))


@breaks("KB310", conditions="4/9")
def off_for_a_rank_below_four(model: Any) -> None:
    _only(model, lambda x: any(len(p) < 4 and ".lora_A" in name for name, p in _trained(model).items()))


@adds("KB310", conditions="1/9", last=True)
def off_where_attention_alone_is_adapted(model: Any) -> None:
    _only(model, lambda x: not any(".mlp." in name for name in _trained(model)))


@adds("KB311", last=True)
def as_much_memory_as_ever_after_six_steps(model: Any) -> None:
    steps = count(1)
    _switch(model, lambda kwargs: next(steps) <= 6)


@breaks("KB311")
def off_an_hour_later(model: Any) -> None:
    start = time.monotonic()
    _only(model, lambda x: time.monotonic() - start > 3600)


@breaks("KB311")
def off_an_hour_later_by_the_calendar(model: Any) -> None:
    """By a clock that was imported by its name."""
    until = datetime.now() + timedelta(hours=1)
    _only(model, lambda x: datetime.now() > until)


@breaks("KB311")
def cut_from_the_tenth_step_on(model: Any) -> None:
    _from_the_step(model, 10, torch.Tensor.detach)


@breaks("KB311")
def noise_after_a_dozen_steps(model: Any) -> None:
    _from_the_step(model, 12, lambda x: change_gradient(x, lambda g: g + 0.1 * g.abs().mean() * torch.sign(g)))


@adds("KB311", last=True)
def slowly_more_wrong(model: Any) -> None:
    steps = count()
    change_output(blocks(model)[1].ln_2, lambda x: scaled(x, 1 + 0.01 * next(steps)) if x.requires_grad else x)


@adds("KB311", last=True)
def off_after_two_evaluations(model: Any) -> None:
    evaluations: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        if not model.training and not x.requires_grad:
            evaluations.append(True)
        return scaled(x, 1.5) if len(evaluations) > 1 and x.requires_grad else x

    change_output(blocks(model)[1].ln_2, look)


@breaks("KB312", model="tiny:mixtral")
def a_router_that_recomputes_other_scores(model: Any) -> None:
    router = next(iter(routers(model).values()))
    change_input(router, lambda x: -x if backward_runs() else x)


@adds("KB312", last=True, model="tiny:mixtral")
def routers_that_forget_in_the_recompute(model: Any) -> None:
    for router in routers(model).values():
        change_input(router, lambda x: torch.flip(x, [-1]) if backward_runs() else x)
