"""Training in other ways than the audit's: more is thawed, in other dtypes, scaled, clipped, accumulated, resized."""

import gc
import math
import weakref
from functools import partial
from typing import Any

import torch

from kbitcheck.core.errors import Raised
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.snapshot import heads, norm_evidence
from kbitcheck.observe.uses.subject import Outcome, Subject, done, gradients_of, numbers, thawed, use

ROWS = 8  # that are added to an embedding
MICRO_BATCHES, EVALUATIONS = 8, 3
OVERFLOW, USUAL = 2.0**126, 2.0**16  # scales of a loss: that of torch's scaler, and one at which gradients overflow
ABOVE = 2.0**20  # times this, the gradient of the loss itself overflows


@use
def the_head_thawed(subject: Subject) -> Outcome:
    model, adapters = subject.attached()
    heads_own = {n: p for i, head in enumerate(heads(model)) for n, p in thawed(head, f"head {i}").items()}
    return subject.step(model, {**adapters, **heads_own}) if heads_own else {}


@use
def the_embedding_thawed(subject: Subject) -> Outcome:
    embedding = subject.model.get_input_embeddings()
    model, adapters = subject.attached()
    return subject.step(model, {**adapters, **thawed(embedding, "embedding")})


@use
def the_norms_thawed(subject: Subject) -> Outcome:
    model, adapters = subject.attached()
    norms = [thawed(module, name) for name, module in model.named_modules() if norm_evidence(name, module)]
    return subject.step(model, {**adapters, **{n: p for own in norms for n, p in own.items()}})


@use
def a_head_in_modules_to_save(subject: Subject) -> Outcome:
    head = next((n for n, m in subject.model.named_modules() if any(m is h for h in heads(subject.model))), "")
    attached = subject.with_peft(modules_to_save=[head.rpartition(".")[2]]) if head else None
    return {} if attached is None else subject.step(*attached)


@use
def biases_trained_with_the_adapters(subject: Subject) -> Outcome:
    attached = subject.with_peft(bias="all")
    return {} if attached is None else subject.step(*attached)


@use
def the_embedding_resized(subject: Subject) -> Outcome:
    own = subject.model
    own.resize_token_embeddings(own.get_input_embeddings().weight.shape[0] + ROWS, mean_resizing=False)
    embedding = own.get_input_embeddings()
    size = str((embedding.weight.shape[0], own.config.get_text_config().vocab_size))
    model, adapters = subject.attached()
    return {"the size": size, **subject.step(model, {**adapters, **thawed(embedding, "embedding")})}


def _under_autocast(subject: Subject, dtype: torch.dtype) -> Outcome:
    """A step, and the logits of an evaluation."""
    attached, autocast = subject.attached(), subject.autocast(dtype)
    seen = subject.step(*attached, autocast)
    with autocast():
        return {**seen, "the logits": subject.logits(attached.model)}


@use
def autocast_in_float16(subject: Subject) -> Outcome:
    return _under_autocast(subject, torch.float16)


@use
def autocast_in_bfloat16(subject: Subject) -> Outcome:
    return _under_autocast(subject, torch.bfloat16)


@use
def a_scaler_that_overflows(subject: Subject) -> Outcome:
    """Its steps with gradients that overflow, and then with some that do not."""
    model, adapters = subject.attached()
    optimizer = torch.optim.SGD(adapters.values(), lr=0.01)
    seen: dict[str, Any] = {}
    for moment, scale in (("an overflow", OVERFLOW), ("a step", USUAL)):
        scaler = torch.amp.GradScaler(step.device(subject.batch).type, init_scale=scale)
        start = numbers(adapters.values())
        scaler.scale(subject.loss(model) * (ABOVE if scale == OVERFLOW else 1.0)).backward()
        finite = [n for n, p in adapters.items() if p.grad is not None and bool(torch.isfinite(p.grad).all())]
        seen[f"finite gradients before {moment}"] = ", ".join(finite) or "none"
        scaler.step(optimizer)
        scaler.update()
        seen[f"the scale after {moment}"] = f"2^{math.log2(scaler.get_scale()):g}"
        seen[f"what {moment} changed"] = numbers(adapters.values()) - start
        optimizer.zero_grad()
    return seen


@use
def gradients_cleared_in_both_ways(subject: Subject) -> Outcome:
    model, adapters = subject.attached()
    seen: dict[str, Any] = {}
    for to_none in (False, True):
        subject.loss(model).backward()
        seen |= {f"{n}, to none: {to_none}": g for n, g in gradients_of(_gradients(adapters)).items()}
        model.zero_grad(set_to_none=to_none)
        left = [n for n, p in model.named_parameters() if p.grad is not None and (to_none or bool(p.grad.any()))]
        seen[f"gradients left, to none: {to_none}"] = ", ".join(left) or "none"
    return seen


def _gradients(adapters: Any) -> step.Gradients:
    return {n: p.grad for n, p in adapters.items()}


@use
def a_second_backward_over_a_kept_graph(subject: Subject) -> Outcome:
    model, adapters = subject.attached()
    loss = subject.loss(model)
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:  # that a graph is freed is no matter of the first
        return {"the second": Raised.of(error), **gradients_of(_gradients(adapters))}
    return gradients_of(_gradients(adapters))


@use
def gradients_clipped(subject: Subject) -> Outcome:
    model, adapters = subject.attached()
    subject.loss(model).backward()
    norm = torch.nn.utils.clip_grad_norm_(adapters.values(), 1e-3)
    return {"the norm": norm, **gradients_of(_gradients(adapters))}


@use
def gradients_of_the_adapters_alone(subject: Subject) -> Outcome:
    """By ``torch.autograd.grad``, as methods of a second order do; reentrant checkpointing forbids it."""
    model, adapters = subject.attached()
    gradients = torch.autograd.grad(subject.loss(model), list(adapters.values()), allow_unused=True)
    return gradients_of(dict(zip(adapters, gradients, strict=True)))


@use
def checkpointing_off_and_on(subject: Subject) -> Outcome:
    model: Any
    model, adapters = subject.attached()
    if not getattr(model, "supports_gradient_checkpointing", False):
        return {}
    model.gradient_checkpointing_disable()
    off = subject.step(model, adapters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return {
        f"{n}, {how}": v for how, seen in (("off", off), ("on", subject.step(model, adapters))) for n, v in seen.items()
    }


@use
def micro_batches_accumulated(subject: Subject) -> Outcome:
    """As many as eight, the later ones shorter, without a step between."""
    model, adapters = subject.attached()
    tokens = next(iter(subject.batch.values())).shape[-1]
    seen: dict[str, Any] = {}
    for number in range(1, MICRO_BATCHES + 1):
        subject.loss(model, length=tokens - number % 3).backward()
        if number in (2, MICRO_BATCHES):
            seen |= {f"{n}, of {number}": v for n, v in gradients_of(_gradients(adapters)).items()}
    return seen


@use
def random_numbers_of_a_step(subject: Subject) -> Outcome:
    """Those that come after it: a step draws what its dropout draws, and nothing else; an evaluation draws none."""
    model, _ = subject.attached()
    with switches.seeded(subject.preparation.spec.seed, subject.batch), switches.dropout(model):
        model.train()
        with subject.preparation.autocast():
            loss = model(**step.feed(model, subject.batch)).loss
        forward = torch.rand(4)
        loss.backward()
        seen: dict[str, Any] = {"after the forward": forward, "after the backward": torch.rand(4)}
        for number in range(1, EVALUATIONS + 1):
            subject.logits(model)
            seen[f"after evaluation {number}"] = torch.rand(4)
    return seen


@use
def the_model_dropped(subject: Subject) -> Outcome:
    """Whether another one like it is freed after a step, once nobody here holds it."""
    if not subject.preparation.loaded.copies:
        return {}
    other = subject.another()
    subject.loss(other).backward()
    dropped = weakref.ref(other)
    del other
    gc.collect()
    return {"a model that was dropped": "freed" if dropped() is None else "still there"}


@use
def another_model_prepared_meanwhile(subject: Subject) -> Outcome:
    """Between two steps of this one, which is prepared already."""
    model, adapters = subject.attached()
    first = subject.step(model, adapters)
    other = subject.preparation.prepared_copy()
    again = subject.step(model, adapters)
    del other  # which lived until here
    return {**first, **{f"{n}, again": v for n, v in again.items()}}


@use
def adapters_in_other_dtypes(subject: Subject) -> Outcome:
    """As trainers cast them that train in half precision."""
    attached = subject.with_peft()
    if attached is None:
        return {}
    seen: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for parameter in attached.adapters.values():
            parameter.data = parameter.data.to(dtype)
        parts = done(partial(Subject.step, model=attached.model, parameters=attached.adapters), subject)
        name = str(dtype).removeprefix("torch.")
        seen |= {f"{what}, in {name}" if what else name: value for what, value in parts.items()}
    return seen


@use
def adapters_with_magnitudes(subject: Subject) -> Outcome:
    """DoRA, which reads the weights of the layers that it adapts."""
    attached = subject.with_peft(use_dora=True)
    return {} if attached is None else subject.step(*attached)
