"""Forwards under every condition a user may run the model in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kbitcheck.facts import ForwardFacts
from kbitcheck.probes import step
from kbitcheck.probes.live import tensors


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward: whether every output was finite, what it raised ("" if nothing), its logits."""

    condition: str
    autocast: bool
    finite: bool
    raised: str
    logits: torch.Tensor | None


def conditions(batch: step.Batch) -> list[tuple[str, bool, bool, bool]]:
    """(text, training, with mask, autocast) for each condition; without a mask in the batch, those without alone."""
    masked = (True, False) if "attention_mask" in batch else (False,)
    return [
        (f"{'train' if training else 'eval'}, {'with' if mask else 'no'} mask, {'autocast' if auto else 'no autocast'}",
         training, mask, auto)
        for training in (True, False)
        for mask in masked
        for auto in (True, False)
    ]  # fmt: skip


def run(
    model: nn.Module, batch: step.Batch, *, training: bool, mask: bool, autocast: torch.dtype | None
) -> tuple[bool, str, torch.Tensor | None]:
    """Whether every output of one forward is finite, what it raised ("" if nothing), and its logits. No dropout."""
    fed = step.feed(model, batch)
    inputs = fed if mask else {k: v for k, v in fed.items() if k != "attention_mask"}
    device = next(iter(batch.values())).device.type
    model.train(training)
    context: Any = torch.autocast(device, dtype=autocast) if autocast else nullcontext()
    try:
        with torch.set_grad_enabled(training), context, step.seeded(0, device), step.dropout_raised(model, 0.0):
            output = model(**inputs)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}".splitlines()[0], None
    floating = [t for t in tensors(dict(output)) if t.is_floating_point() and t.numel()]
    # -inf is a mask's way to say "never": only NaN and a loss or logits that overflow are wrong.
    return bool(floating) and all(bool(torch.isfinite(t).all()) for t in floating[:2]), "", output.logits.detach()


def everywhere(model: nn.Module, batch: step.Batch, autocast: torch.dtype) -> list[Forward]:
    """A forward under every condition. The model is used up: eval mode may repack weights."""
    return [
        Forward(text, auto, *run(model, batch, training=training, mask=mask, autocast=autocast if auto else None))
        for text, training, mask, auto in conditions(batch)
    ]


def compare(found: Sequence[Forward], base: Sequence[Forward]) -> list[ForwardFacts]:
    """The prepared model's forwards beside the unprepared base's."""
    uncast = {b.condition.replace("no autocast", "autocast"): b.logits for b in base if not b.autocast}
    trained = {bare.condition.replace("train", "eval"): bare.logits for bare in base if "train" in bare.condition}
    return [
        ForwardFacts(
            condition=mine.condition,
            autocast=mine.autocast,
            finite=mine.finite,
            raised=mine.raised,
            base_raised=bare.raised,
            base_finite=bare.finite,
            apart=_apart(mine.logits, bare.logits) if mine.finite and bare.finite else None,
            base_cast=(_apart(bare.logits, uncast.get(bare.condition)) or 0.0) if bare.finite else 0.0,
            base_step=(_apart(bare.logits, trained.get(bare.condition)) or 0.0) if bare.finite else 0.0,
        )
        for mine, bare in zip(found, base, strict=True)
    ]


def _apart(found: torch.Tensor | None, base: torch.Tensor | None) -> float | None:
    if found is None or base is None:
        return None
    return float((found.double() - base.double()).norm() / base.double().norm())


def generate(model: Any, batch: Mapping[str, torch.Tensor]) -> ForwardFacts:
    """A short greedy generation after training, in eval mode; the model is used up."""
    model.eval()
    inputs = {k: v[:1] for k, v in step.feed(model, batch).items() if k not in ("labels", "decoder_input_ids")}
    raised, finite = "", False
    try:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        finite = tokens.numel() > 0
    except Exception as error:
        raised = f"{type(error).__name__}: {error}".splitlines()[0]
    return ForwardFacts(condition="generate", autocast=False, finite=finite, raised=raised)
