"""Forms in which a model is called to train: with each keyword of its forward, without labels, with embeddings for tokens."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck.observe.forecast.predict import token_limit
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.forms import FORMS, PLAIN, Form, Inputs
from kbitcheck.observe.probes.loss import drawn_loss
from kbitcheck.observe.uses.subject import Outcome, Parameters, Subject, Value, done, gradients_of, use

LENGTHS = (64, 512)  # as people choose them: powers of two
ROWS = 16  # as many as people train at once, and more than there were in the forwards before
ENCODED = frozenset({"input_ids", "input_features"})  # what an encoder reads
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")
PARTS = ("loss", "logits", "hidden_states", "attentions")


@use
def keywords_of_the_forward(subject: Subject) -> Outcome:
    """What each form of a call gives in train mode, and the gradients of it."""
    accepted = inspect.signature(type(subject.model).forward)
    model, adapters = subject.attached()
    seen: dict[str, Value] = {"the signature": str([*accepted.parameters])}
    batch = step.feed(model, subject.batch)
    ids = batch.get("input_ids")
    if ids is not None and "attention_mask" in accepted.parameters:
        batch["attention_mask"] = torch.ones_like(ids)
    calls = [(form, batch) for form in FORMS if form.taken_by(subject.model, batch)]
    if "pixel_values" in batch:
        text = {n: v for n, v in batch.items() if "pixel" not in n and "image" not in n}
        calls.append((replace(PLAIN, name="a text without images"), text))
    tokens = all(tensor.dim() == 2 for tensor in batch.values())  # a classifier has a label a row
    if tokens and batch.keys() <= {"input_ids", "attention_mask", "labels"}:
        limit = token_limit(subject.model)
        calls += [(_row_of(length), _repeated(batch, length)) for length in LENGTHS if length <= limit]
        calls.append((replace(PLAIN, name=f"{ROWS} rows"), {n: t.repeat(ROWS, 1) for n, t in batch.items()}))
        calls.append((replace(PLAIN, name="texts that end within a row"), _ending(subject.model, batch)))
    for form, inputs in calls:
        parts = done(partial(_called, model=model, adapters=adapters, form=form, inputs=inputs), subject)
        seen |= {f"{form.name}: {part}" if part else form.name: value for part, value in parts.items()}
    return seen


@use
def an_encoder_that_ran_before(subject: Subject) -> Outcome:
    """The decoder alone is called, as where the encoder runs once for several decoders."""
    batch = step.feed(subject.model, subject.batch)
    if not subject.model.config.is_encoder_decoder or not batch.keys() & ENCODED:
        return {}
    return _called(
        subject, *subject.attached(), form=replace(PLAIN, name="encoder outputs", inputs=_encoded), inputs=batch
    )


def _encoded(model: Any, batch: Inputs) -> Inputs:
    """What the encoder makes of its inputs in their place, as where it runs once for several decoders."""
    own = {name: value for name, value in batch.items() if name in {*ENCODED, "attention_mask"}}
    rest = {name: value for name, value in batch.items() if name not in ENCODED}
    return {**rest, "encoder_outputs": model.get_encoder()(**own)}


def _ending(model: Any, batch: Inputs) -> Inputs:
    """The batch with the tokens that end and begin a text behind the first of each row, as where texts are packed."""
    ids, config = batch["input_ids"].clone(), model.config.get_text_config()
    for number, name in enumerate(SPECIAL, 1):
        token = getattr(config, name, None)
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            ids[:, number] = token
    return {**batch, "input_ids": ids}


def _row_of(length: int) -> Form:
    return replace(PLAIN, name=f"a row of {length} tokens")


def _repeated(batch: Inputs, length: int) -> Inputs:
    """The batch, once and again, until it has so many tokens."""
    return {name: t.repeat(1, -(-length // t.shape[1]))[:, :length] for name, t in batch.items()}


def _called(subject: Subject, model: nn.Module, adapters: Parameters, form: Form, inputs: Inputs) -> Outcome:
    """The parts of what a forward gives, and the gradients of its loss, or of one of its logits."""
    model.train()
    with switches.seeded(subject.preparation.spec.seed, subject.batch), subject.preparation.autocast():
        output: Any = form.output(model, dict(inputs))
        loss = form.loss(output)
    parts = {part: v.detach() if isinstance(v, torch.Tensor) else v for part, v in _parts(output)}
    loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in adapters.values()]
    parts["gradients of the adapters"] = torch.cat([g.float().flatten() for g in gradients])
    model.zero_grad()
    return parts


def _parts(output: Any) -> Iterator[tuple[str, Value]]:
    """Loss, logits, hidden states and attentions, several in a row; of a tuple the tensors in it, by their places."""
    parts = enumerate(output) if isinstance(output, tuple) else ((part, output.get(part)) for part in PARTS)
    for part, value in parts:
        if isinstance(value, tuple) and not isinstance(output, tuple):
            yield f"number of {part}", str(len(value))
            value = _in_a_row([each for each in value if isinstance(each, torch.Tensor)])
        if isinstance(value, torch.Tensor):
            yield str(part), value


def _in_a_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The numbers of tensors, in the narrowest of their dtypes."""
    narrowest = min((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize, default=None)
    return torch.cat([t.flatten().to(narrowest) for t in tensors]) if tensors else None


@use
def the_model_below_its_head(subject: Subject) -> Outcome:
    """As scripts call it that make a loss of their own of hidden states, in pieces."""
    model, adapters = subject.attached()
    below = getattr(subject.model, "base_model", subject.model)
    batch = {n: t for n, t in step.feed(model, subject.batch).items() if n != "labels"}
    accepted = inspect.signature(type(below).forward).parameters
    if below is subject.model or not batch.keys() <= accepted.keys():
        return {}
    model.train()
    with switches.seeded(subject.preparation.spec.seed, subject.batch), subject.preparation.autocast():
        hidden = below(**batch).last_hidden_state
    drawn_loss([hidden]).backward()
    return {"hidden states": hidden.detach(), **gradients_of({n: p.grad for n, p in adapters.items()})}


@use
def embeddings_in_place_of_ids(subject: Subject) -> Outcome:
    """In each floating dtype, as scripts make them that mix texts with what is no text: hidden states have it, too."""
    model: Any
    model, adapters = subject.attached()
    batch = step.feed(model, subject.batch)
    if "input_ids" not in batch:
        return {}
    own = model.get_input_embeddings()(batch["input_ids"]).dtype
    seen: dict[str, Value] = {}
    for dtype in dict.fromkeys((own, *DTYPES)):
        parts = done(partial(_embedded, model=model, adapters=adapters, dtype=dtype), subject)
        name = str(dtype).removeprefix("torch.")
        seen |= {f"{part}, in {name}" if part else name: value for part, value in parts.items()}
    return seen


def _embedded(subject: Subject, model: Any, adapters: Parameters, dtype: torch.dtype) -> Outcome:
    inputs = step.feed(model, subject.batch)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().to(dtype).requires_grad_(True)
    step.clear_gradients(model)
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
