"""Many cheap optimizer steps of a model, and looks at places that nobody knows before they are drawn."""

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kbitcheck.models.blocks import is_block
from kbitcheck.observe.probes import step
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.clocks import hours_later
from kbitcheck.observe.probes.live import EXISTING, Live, own_tensors, tensors

LOOKS, EVALUATIONS = 3, 2


def soak(
    attached: Attached,
    batch: step.Batch,
    *,
    steps: int,
    entropy: str,
    seed: int,
    autocast: step.Autocast,
    base_evaluates: Callable[[], bool],
) -> Iterator[tuple[str, step.Step]]:
    """The first step, and at each look what a step gives with the adapters as they were before it; by its place.

    In between ``steps`` steps of SGD are taken, and a few evaluations, unless one raises and ``base_evaluates`` says that the
    unprepared base's does, too. From the last look but one on, clocks say that hours have gone by.
    """
    model, adapters = attached
    drawn = random.Random(entropy)  # noqa: S311
    looks = sorted({*drawn.sample(range(steps // 2, steps), LOOKS - 1), steps})
    evaluations = set(drawn.sample(range(1, steps), EVALUATIONS))
    start = [p.detach().clone() for p in adapters.values()]

    def taken() -> step.Step:
        return step.train_step(model, batch, adapters, seed=seed, autocast=autocast, watch=False)

    yield "the first step", taken()
    with ExitStack() as later:
        for number in range(1, steps + 1):
            gradients = taken().gradients
            with torch.no_grad():
                for name, parameter in adapters.items():
                    gradient = gradients[name]
                    if gradient is not None:
                        parameter.sub_(gradient.to(parameter.dtype), alpha=0.01)
            if number in evaluations and not _evaluates(model, batch, autocast, base_evaluates):
                evaluations.clear()
            if number == looks[-2]:
                later.enter_context(hours_later())
            if number in looks:
                now = _swapped(adapters, start)
                yield f"{number} steps{' and hours' if number >= looks[-2] else ''}", taken()
                _swapped(adapters, now)


def _evaluates(
    model: torch.nn.Module, batch: step.Batch, autocast: step.Autocast, base_evaluates: Callable[[], bool]
) -> bool:
    """Whether an evaluation runs; what it raises is raised again where the base's runs."""
    model.eval()
    try:
        with torch.no_grad(), autocast():
            model(**step.feed(model, batch))
    except Exception as error:  # the model's own code may raise anything
        if isinstance(error, torch.OutOfMemoryError) or base_evaluates():
            raise
        return False
    return True


@contextmanager
def kept(model: nn.Module, batch: step.Batch) -> Iterator[list[int]]:
    """Fill a list, at the end of the context, with the bytes alive of all that the modules of blocks returned in it."""
    live, bytes_kept = Live([*own_tensors(model), *batch.values()]), list[int]()

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors(output):
            live.add(tensor)

    with ExitStack() as hooks:
        for block in filter(is_block, model.modules()):
            for module in block.modules():
                hooks.enter_context(module.register_forward_hook(returned))
        yield bytes_kept

    def returned_alive() -> int:
        return sum(size for size, tag in live.holds().values() if tag != EXISTING)

    if returned_alive():
        gc.collect()
    bytes_kept.append(returned_alive())


@torch.no_grad()
def _swapped(adapters: Mapping[str, torch.Tensor], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the adapters held, now that they hold ``values``."""
    held = [p.detach().clone() for p in adapters.values()]
    for parameter, value in zip(adapters.values(), values, strict=True):
        parameter.copy_(value)
    return held
