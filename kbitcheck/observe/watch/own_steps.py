"""Steps of a caller's optimizer on a caller's model, taken to look at them and then undone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import WatchedRun
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.watch.observer import Observer
from kbitcheck.observe.watch.updates import LOW

STEPS = 2  # the gradient of ``lora_A`` is zero in the first


def optimizer_steps(
    model: nn.Module,
    batch: step.Batch,
    *,
    optimizer: Any,
    rate: float,
    trains: Sequence[str] = (),
    autocast: step.Autocast,
) -> WatchedRun:
    """What two steps of ``optimizer`` do, or, where that is None, two of AdamW at ``rate``.

    A learning rate that the schedule has at zero is its peak here. The model is left as the steps make it; the optimizer is
    as before.
    """
    assumed = ""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        assumed = f"AdamW at a learning rate of {rate:g}"
        if not any(p.dtype in LOW for p in trained):  # nothing to forecast
            return WatchedRun(steps=(), adapters=frozenset(), held=frozenset(), assumed=assumed)
        optimizer = torch.optim.AdamW(trained, lr=rate)
    observer = Observer(model, steps=STEPS, trains=trains, optimizer=optimizer, by_check=True)
    with optimizer_restored(optimizer):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] or group.get("initial_lr", 0.0)  # a schedule may not have begun, or have run out
        observer.start()
        try:
            for _ in range(STEPS):
                _take(model, batch, optimizer, autocast)
        finally:
            observer.stop()
            step.clear_gradients(model)
    run = observer.run
    if observer.failed or len(run.steps) != STEPS:
        why = observer.failed or f"{len(run.steps)} of {STEPS} were seen"
        raise Unavailable(f"the optimizer's steps could not be observed: {why}", failed=True)
    return dataclasses.replace(run, assumed=assumed)


def _take(model: nn.Module, batch: step.Batch, optimizer: Any, autocast: step.Autocast) -> None:
    step.clear_gradients(model)
    model.train()
    with switches.seeded(0, batch):
        with autocast():
            loss = model(**step.feed(model, batch)).loss
        if loss.requires_grad:
            loss.backward()
        type(optimizer).step(optimizer)  # without what a schedule put over it, which counts


@contextmanager
def optimizer_restored(optimizer: Any) -> Iterator[None]:
    """Put back what steps change of an optimizer: its attributes, the options of its groups, its state, bit by bit."""
    attributes = dict(vars(optimizer))
    groups = [
        (group, {k: copy.copy(v) if k != "params" else v for k, v in group.items()}) for group in optimizer.param_groups
    ]
    states = [(parameter, state, _numbers(state)) for parameter, state in optimizer.state.items()]
    try:
        yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for group, options in groups:
            group.clear()
            group.update(options)
        optimizer.state.clear()
        for parameter, state, numbers in states:
            state.clear()
            for key, (value, before) in numbers.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(before)
                state[key] = value
            optimizer.state[parameter] = state


def _numbers(state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (value, value.clone() if isinstance(value, torch.Tensor) else None) for key, value in state.items()}


def parts_of(trained: Any) -> tuple[Any, Any]:
    """A model and its optimizer; of a ``Trainer`` both, of a model None for the optimizer.

    A trainer that has no optimizer yet makes one as it will for training, and does not keep it.
    """
    if isinstance(trained, nn.Module) or not isinstance(getattr(trained, "model", None), nn.Module):
        return trained, None
    if trained.optimizer is not None:
        return trained.model, trained.optimizer
    try:
        trained.create_optimizer()
        return trained.model, trained.optimizer
    finally:
        trained.optimizer = None
