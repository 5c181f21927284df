"""Circumstances in which a model is prepared, none of which changes what comes of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck.observe import internals
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.call import SECOND, THIRD
from kbitcheck.observe.uses.subject import Outcome, Subject, Value, done, floating, use

OTHER = {"use_reentrant": False, "preserve_rng_state": False}  # as no case asks
HALVES = (torch.float16, torch.bfloat16)
LOADED = (*HALVES, torch.float32)
Before = Callable[[Subject, Any], Any]


def _run(subject: Subject, model: Any) -> None:
    with torch.no_grad(), subject.preparation.autocast():
        model(**step.feed(model, subject.batch))


def _checkpointed(subject: Subject, model: Any) -> None:
    switches.quietly(lambda: model.gradient_checkpointing_enable(OTHER))


def _attending_otherwise(model: Any) -> None:
    own = internals.attention(model.config)
    internals.choose_attention(model.config, "sdpa" if own == "eager" else "eager")


# A forward must be the last that is tried: what it leaves in a model that is lent is there afterwards.
CIRCUMSTANCES: Mapping[str, Before] = {
    "frozen before": lambda subject, model: model.requires_grad_(False),
    "with another attention": lambda subject, model: _attending_otherwise(model),
    "in train mode": lambda subject, model: model.train(),
    "run before": _run,
}
# Those of a case that asks for checkpointing: what was on before stays on in others.
SWITCHED: Mapping[str, Before] = {
    "checkpointed before": _checkpointed,
    "prepared before in another mode": lambda subject, model: subject.prepared(model, {SECOND: True, THIRD: OTHER}),
}


@use
def prepared_in_other_circumstances(subject: Subject) -> Outcome:
    """A model that was frozen, run or checkpointed before: what is prepared is the same, and what a step gives."""
    if not subject.preparation.loaded.copies:
        return {}
    on = bool(subject.preparation.keywords[SECOND]) and getattr(subject.model, "supports_gradient_checkpointing", False)
    seen: dict[str, Value] = {}
    for name, before in {**CIRCUMSTANCES, **(SWITCHED if on else {})}.items():
        parts = done(partial(_prepared_after, before=before), subject)
        seen |= {f"{part}, {name}" if part else name: value for part, value in parts.items()}
    return seen


@use
def loaded_in_other_dtypes(subject: Subject) -> Outcome:
    """The base as where it is loaded in each other dtype, of a preparation that casts all of them to one."""
    if not subject.preparation.loaded.copies or subject.preparation.spec.profile != "peft":
        return {}
    seen: dict[str, Value] = {}
    under = subject.drawn_in_order((None, *HALVES))  # which dtype is run under which autocast depends on the seed
    for dtype, autocast in zip(LOADED, under, strict=True):
        parts = done(partial(_prepared_after, before=partial(_cast, dtype), autocast=autocast), subject)
        name = str(dtype).removeprefix("torch.")
        seen |= {f"{part}, in {name}" if part else name: value for part, value in parts.items()}
    return seen


def _cast(dtype: torch.dtype, subject: Subject, model: Any) -> None:
    for parameter in floating(model).values():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _prepared_after(subject: Subject, before: Before, autocast: torch.dtype | None = None) -> Outcome:
    """What is prepared afterwards, and a step of it; another one under ``autocast``."""
    model = subject.fresh()
    before(subject, model)
    model = subject.prepared(model)
    usual, now = _state(subject.model), _state(model)
    others = [name for name in {**usual, **now} if usual.get(name) != now.get(name)]
    attached = subject.attached(model)
    seen = {"what is not as usual": ", ".join(others) or "nothing", **subject.step(*attached)}
    if autocast is None:
        return seen
    mixed = subject.step(*attached, subject.autocast(autocast))
    return seen | {f"{part}, under autocast in {autocast}": value for part, value in mixed.items()}


def _state(model: nn.Module) -> Mapping[str, str]:
    """The dtype and the flag of each parameter, and how the model checkpoints and attends."""
    held = {name: f"{p.dtype}, trains: {p.requires_grad}" for name, p in model.named_parameters()}
    held["how it attends"] = str(internals.attention(getattr(model, "config", None)))
    return {**held, "how it checkpoints": f"{switches.mode_of(model)} {internals.checkpoint_keywords(model)}"}
