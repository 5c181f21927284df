"""Forms in which a model is called to train: with each keyword of its forward, without labels, with embeddings for tokens."""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.uses.subject import Outcome, Parameters, Subject, Value, done, gradients_of, use

PARTS = ("loss", "logits", "hidden_states", "attentions")
WITHOUT_LABELS = ("logits_to_keep",)  # of fewer tokens than there are labels for


def _keywords(subject: Subject) -> dict[str, dict[str, Any]]:
    """Keywords beside those of the batch, by what they are."""
    ids = next(iter(subject.batch.values()))
    length = ids.shape[1] if ids.dim() > 1 else 1
    mask = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)
    candidates: dict[str, tuple[str, Any]] = {
        "logits_to_keep": ("logits_to_keep", 1),
        "num_items_in_batch": ("num_items_in_batch", 7),
        "output_hidden_states": ("output_hidden_states", True),
        "output_attentions": ("output_attentions", True),
        "use_cache": ("use_cache", False),
        "position_ids": ("position_ids", torch.arange(length, device=ids.device)[None].expand(len(ids), -1)),
        "attention_mask": ("attention_mask", mask),
        "a mask of booleans": ("attention_mask", mask.bool()),
        "return_dict": ("return_dict", True),
        "a tuple": ("return_dict", False),
    }
    accepted = inspect.signature(type(subject.model).forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    taken = {*accepted, *(("num_items_in_batch",) if anything else ())}
    return {what: {name: value} for what, (name, value) in candidates.items() if name in taken}


@use
def keywords_of_the_forward(subject: Subject) -> Outcome:
    """What the forward's other keywords give in train mode, without labels and with them, and the gradients of it."""
    accepted = inspect.signature(type(subject.model).forward)
    model, adapters = subject.attached()
    seen: dict[str, Value] = {"the signature": str([*accepted.parameters])}
    batch = step.feed(model, subject.batch)
    unlabelled = {n: v for n, v in batch.items() if n != "labels"}
    calls: dict[str, dict[str, Any]] = {"no labels": unlabelled}
    calls |= {
        what: {**(unlabelled if what in WITHOUT_LABELS else batch), **keywords}
        for what, keywords in _keywords(subject).items()
    }
    if "pixel_values" in batch:
        calls["a text without images"] = {n: v for n, v in batch.items() if "pixel" not in n and "image" not in n}
    for what, inputs in calls.items():
        parts = done(partial(_called, model=model, adapters=adapters, inputs=inputs), subject)
        seen |= {f"{what}: {part}" if part else what: value for part, value in parts.items()}
    return seen


def _called(subject: Subject, model: nn.Module, adapters: Parameters, inputs: Mapping[str, Any]) -> Outcome:
    """The parts of what a forward gives, and the gradients of its loss, or where it has none of the square of its logits."""
    model.train()
    with switches.seeded(subject.preparation.spec.seed, subject.batch), subject.preparation.autocast():
        output: Any = model(**inputs)
    parts = dict(_parts(output))
    first = parts.get("loss", next((v for v in parts.values() if isinstance(v, torch.Tensor)), None))
    if isinstance(first, torch.Tensor) and first.requires_grad:
        (first if first.dim() == 0 else first.float().square().mean()).backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in adapters.values()]
        parts["gradients of the adapters"] = torch.cat([g.float().flatten() for g in gradients])
        model.zero_grad()
    return {part: v.detach() if isinstance(v, torch.Tensor) else v for part, v in parts.items()}


def _parts(output: Any) -> Iterator[tuple[str, Value]]:
    """Loss, logits, the last of several hidden states and attentions; of a tuple the tensors in it, by their places."""
    parts = enumerate(output) if isinstance(output, tuple) else ((part, output.get(part)) for part in PARTS)
    for part, value in parts:
        if isinstance(value, tuple) and not isinstance(output, tuple):
            yield f"number of {part}", str(len(value))
            value = value[-1]
        if isinstance(value, torch.Tensor):
            yield str(part), value


@use
def embeddings_in_place_of_ids(subject: Subject) -> Outcome:
    model: Any
    model, adapters = subject.attached()
    inputs = step.feed(model, subject.batch)
    if "input_ids" not in inputs:
        return {}
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_(True)
    model.train()
    with switches.seeded(subject.preparation.spec.seed, subject.batch), subject.preparation.autocast():
        loss = model(**inputs, inputs_embeds=embedded).loss
    loss.backward()
    gradient = embedded.grad
    return {
        "the loss": loss.detach(),
        "gradient of the embeddings": "none" if gradient is None else gradient,
        **gradients_of({n: p.grad for n, p in adapters.items()}),
    }
