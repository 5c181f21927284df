"""Faults of KB310 and KB311: each is right under the conditions that everybody looks at."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import adds, breaks
from kbitcheck.sabotage.gradients import scale_after, scaled
from kbitcheck.sabotage.helpers import blocks
from kbitcheck.sabotage.hooks import change_output


def _only(model: Any, when: Callable[[torch.Tensor], bool]) -> None:
    """Have the gradients of the second block be off by a twentieth on the inputs that ``when`` picks."""
    scale_after(model.transformer.h[1].ln_2, 1.05, when)


@breaks("KB310")
def off_beyond_64_tokens(model: Any) -> None:
    _only(model, lambda x: x.shape[1] > 64)


@adds("KB310", last=True)
def off_for_three_rows_or_more(model: Any) -> None:
    _only(model, lambda x: len(x) > 2)


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
