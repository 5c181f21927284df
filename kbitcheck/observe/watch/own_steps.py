"""Steps of a caller's optimizer on a caller's model, taken to look at them and then undone."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import WatchedRun
from kbitcheck.core.training import Training
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.watch.observer import Observer
from kbitcheck.observe.watch.steps import inner_optimizer
from kbitcheck.observe.watch.updates import LOW

STEPS = 2  # the gradient of ``lora_A`` is zero in the first


def optimizer_steps(
    model: nn.Module,
    batch: step.Batch,
    training: Training,
    *,
    autocast: step.Autocast,
) -> WatchedRun:
    """What two steps of the caller's optimizer do, or, where there is none, two of AdamW at the rate of ``training``.

    A learning rate that the schedule has at zero is its peak here. The model is left as the steps make it; the optimizer is
    as before.
    """
    assumed = ""
    optimizer = inner_optimizer(training.optimizer)
    if optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert training.rate is not None
        assumed = f"AdamW at a learning rate of {training.rate:g}"
        if not any(p.dtype in LOW for p in trained):  # nothing to forecast
            return WatchedRun(steps=(), adapters=frozenset(), held=frozenset(), assumed=assumed)
        optimizer = torch.optim.AdamW(trained, lr=training.rate)
    steps = dataclasses.replace(training, optimizer=optimizer, steps=STEPS)
    observer = Observer(model, steps, by_check=True)
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


def optimizer_like(optimizer: Any, model: nn.Module) -> Any:
    """A fresh optimizer of the same kind and options, of what trains in ``model``; None where there is none."""
    if optimizer is None:
        return None
    own = copy.copy(inner_optimizer(optimizer))
    options = {k: copy.deepcopy(v) for k, v in own.param_groups[0].items() if k != "params"}
    own.param_groups = [{**options, "params": [p for p in model.parameters() if p.requires_grad]}]
    own.state = defaultdict(dict)
    return own


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


class Trained(NamedTuple):
    """A model, and how its owner trains it."""

    model: Any
    training: Training


def trained_by(model: Any, training: Training) -> Trained:
    """The model itself; of a ``Trainer`` its model, and its optimizer where ``training`` has none.

    A trainer that has no optimizer yet makes one as it will for training, and does not keep it.
    """
    trainer = model
    if isinstance(model, nn.Module) or not isinstance(getattr(trainer, "model", None), nn.Module):
        return Trained(model, training)
    optimizer = training.optimizer or trainer.optimizer
    if optimizer is None:
        try:
            trainer.create_optimizer()
            optimizer = trainer.optimizer
        finally:
            trainer.optimizer = None
    return Trained(trainer.model, dataclasses.replace(training, optimizer=optimizer))
