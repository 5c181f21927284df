"""One training step, watched: which blocks ran when, what reached torch's checkpoint, which gradients came out."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from kbitcheck.core.facts import Distance, RunFacts
from kbitcheck.observe.probes import blocks, digest, kv_cache, switches
from kbitcheck.observe.probes.forms import Formed

Batch = Mapping[str, torch.Tensor]
Gradients = dict[str, torch.Tensor | None]
Autocast = Callable[[], AbstractContextManager[Any]]  # makes the context that a forward runs in


class Step(NamedTuple):
    """One training step: its facts, and copies of the adapters' gradients by name."""

    facts: RunFacts
    gradients: Gradients


def device(batch: Batch) -> torch.device:
    """Where the batch is."""
    return next(iter(batch.values())).device


def feed(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch with audio and images in the dtype of the convolution that reads them, as a data loader's cast does."""
    if not any(v.is_floating_point() for v in batch.values()):
        return dict(batch)
    reader = next((p.dtype for p in model.parameters() if p.dim() >= 3 and p.is_floating_point()), None)
    return {k: v.to(reader) if reader and v.is_floating_point() else v for k, v in batch.items()}


def forward(model: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
    """What a model gives for a batch, called in the batch's form if it has one, and the loss in it."""
    if isinstance(batch, Formed):
        output = batch.form.output(model, feed(model, batch))
        return output, batch.form.loss(output)
    output = model(**feed(model, batch))
    return output, output.loss


def train_step(
    model: nn.Module,
    batch: Batch,
    adapters: Mapping[str, nn.Parameter],
    *,
    seed: int = 0,
    autocast: Autocast = nullcontext,
    watch: bool = True,
    gathered: Gradients | None = None,
    forward_only: bool = False,
) -> Step:
    """One forward and backward in train mode. Leaves no gradient.

    ``watch`` records blocks and buffers. ``gathered`` are gradients of earlier steps to add to, as in gradient accumulation.
    With ``forward_only`` the loss is all that is wanted: there is no backward.
    """
    clear_gradients(model)
    state = buffers(model) if watch else {}
    for name, gradient in (gathered or {}).items():
        adapters[name].grad = gradient
    model.train()
    with (
        blocks.Watch(model if watch else nn.Identity()) as watcher,
        switches.seeded(seed, batch),
        switches.checkpoint_spies() as calls,
        warnings.catch_warnings(record=True) as heard,
    ):
        warnings.simplefilter("always")
        with autocast():
            output, loss = forward(model, batch)
        watcher.follow(loss)
        watcher.phase = "backward"
        if loss.requires_grad and not forward_only:
            loss.backward()
    owned = {id(p) for p in adapters.values()}
    base = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in owned]
    grads: Gradients = {n: None if p.grad is None else p.grad.detach().clone() for n, p in adapters.items()}
    clear_gradients(model)
    facts = RunFacts(
        loss=float(loss.detach()),
        loss_bits=digest.bits(loss),
        blocks=watcher.facts(),
        order=tuple(watcher.order),
        checkpoints=tuple(calls),
        warnings=tuple(f"{w.category.__name__}: {w.message}".splitlines()[0] for w in heard),
        cache_held=kv_cache.is_held(output),
        inexact=watcher.inexact,
        base_grads=tuple(base),
        buffers={n: bits for n, bits in buffers(model).items() if state.get(n) != bits} if watch else {},
    )
    return Step(facts, grads)


def buffers(model: nn.Module) -> dict[str, str]:
    """A digest of each buffer, by name."""
    return {name: digest.bits(buffer) for name, buffer in model.named_buffers()}


def clear_gradients(model: nn.Module) -> None:
    """Drop every gradient, as ``zero_grad`` does, without relying on the model's own method."""
    for parameter in model.parameters():
        parameter.grad = None


def distance(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Relative Frobenius distance; a missing tensor is zero, and infinitely far from one that is not."""
    if actual is None or expected is None:
        return 0.0 if equal(actual, expected) else math.inf
    target = expected.double()
    norm, gap = float(target.norm()), float((actual.double() - target).norm())
    return gap / norm if norm else (0.0 if gap == 0 else math.inf)


def distances(actual: Gradients, expected: Gradients, yardsticks: Mapping[str, float]) -> dict[str, Distance]:
    """Each gradient against its counterpart, beside its yardstick."""
    return {
        name: Distance(
            equal=equal(gradient, expected[name]),
            relative=distance(gradient, expected[name]),
            yardstick=yardsticks.get(name, 0.0),
        )
        for name, gradient in actual.items()
    }


def same(one: Step, other: Step) -> bool:
    """Whether two steps have the bits of one loss and of the same gradients."""
    gradients = (equal(one.gradients[name], gradient) for name, gradient in other.gradients.items())
    return one.facts.loss_bits == other.facts.loss_bits and all(gradients)


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two gradients have the same bits; a missing one is zero, as checkpointing may leave it either way."""
    if a is None or b is None:
        return not any(bool(t.any()) for t in (a, b) if t is not None)
    return a.dtype == b.dtype and torch.equal(a, b)
