"""Numbers that training meets in the end, and no first step has: tiny losses and gradients, and what is not finite."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck.models.inputs.text import IGNORED
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.snapshot import heads
from kbitcheck.observe.uses.subject import Outcome, Subject, Value, floating, gradients_of, use

# Of a loss: that of many accumulated batches, one that float16 rounds to nothing, and a multiple, as a scaler makes it.
SHARES = (2.0**-10, 2.0**-40, 2.0**40)
MARGIN = 6.0  # between the first logit and the second of a token, in the median


@use
def shares_of_a_loss(subject: Subject) -> Outcome:
    """Gradients of the loss divided by powers of two: the same numbers, but for their exponents."""
    model, adapters = subject.attached()
    seen: dict[str, Value] = {}
    for share in SHARES:
        (subject.loss(model) * share).backward()
        gradients = gradients_of({n: p.grad for n, p in adapters.items()})
        seen |= {f"{n}, of 2^{math.log2(share):g} of the loss": gradient for n, gradient in gradients.items()}
        step.clear_gradients(model)
    return seen


@use
def a_loss_of_almost_nothing(subject: Subject) -> Outcome:
    """As of a model that knows its batch by heart: its logits are far apart, and the labels are the tokens that it is sure of."""
    model, adapters = subject.attached()
    batch, head = step.feed(model, subject.batch), next(iter(heads(subject.model)), None)
    if head is None or "labels" not in batch:
        return {}
    seq2seq = bool(getattr(subject.model.config, "is_encoder_decoder", False))
    if seq2seq:  # which makes its inputs of the labels
        batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
    logits = subject.logits(model, batch).float()
    if logits.shape[:-1] != batch["labels"].shape:
        return {}
    first, second = logits.topk(2).values.unbind(-1)
    margins = (first - second) / (first - second).median()
    sure = logits.argmax(-1).where(margins > 1, IGNORED)
    if not seq2seq:  # its loss shifts the labels
        sure = torch.cat([torch.full_like(sure[:, :1], IGNORED), sure[:, :-1]], 1)
    head.register_forward_hook(partial(_farther_apart, MARGIN / float((first - second).median())))
    model.train()
    with switches.seeded(subject.preparation.spec.seed, batch), subject.preparation.autocast():
        loss: Any = model(**{**batch, "labels": sure}).loss
    loss.backward()
    return {"the loss": loss.detach(), **gradients_of({n: p.grad for n, p in adapters.items()})}


def _farther_apart(factor: float, head: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits * factor


@use
def numbers_that_are_not_finite(subject: Subject) -> Outcome:
    """NaN in the embedding, and infinity in the first adapter: whoever trains is to see them."""
    model, adapters = subject.attached()
    embedding = subject.model.get_input_embeddings()
    tables = {"the embedding": [*floating(embedding).values()], "the first adapter": [*adapters.values()][1:2]}
    seen: dict[str, Value] = {}
    for place, number in (("the embedding", torch.nan), ("the first adapter", torch.inf)):
        for name, value in _with_number(subject, model, adapters.values(), tables[place], number).items():
            seen[f"{name}, with {number} in {place}"] = value
    return seen


def _with_number(
    subject: Subject, model: nn.Module, adapters: Iterable[nn.Parameter], tables: list[nn.Parameter], number: float
) -> Outcome:
    """Which of a step's numbers are finite where tables are full of ``number``."""
    kept = [table.detach().clone() for table in tables]
    for table in tables:
        table.data.fill_(number)
    loss = subject.loss(model)
    loss.backward()
    finite = [p.grad is None or bool(p.grad.isfinite().all()) for p in adapters]
    step.clear_gradients(model)
    seen = {
        "a finite loss": str(bool(loss.isfinite())),
        "finite gradients": f"{sum(finite)} of {len(finite)}",
        "finite logits": str(bool(subject.logits(model).isfinite().all())),
    }
    for table, before in zip(tables, kept, strict=True):
        table.data.copy_(before)
    return seen
