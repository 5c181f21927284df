"""Forwards under every condition a user may run the model in."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice, product
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from kbitcheck.core.errors import Raised
from kbitcheck.core.facts import ForwardFacts
from kbitcheck.models.inputs.text import first_rows
from kbitcheck.observe.probes import routers, step, switches
from kbitcheck.observe.probes.live import tensors


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward: whether every output was finite, what it raised (None if nothing), its logits and routers' choices.

    If the base cannot run an ``optional`` one, it is not judged.
    """

    condition: str
    autocast: bool
    finite: bool
    raised: Raised | None
    routed: routers.Routed | None
    optional: bool = False


TOKENS = 3
EMBEDDED = "train, embeddings in place of ids, no autocast"


def left_padded(batch: step.Batch) -> step.Batch:
    """The batch with each row's padding in front, as for generation, where the mask says that it is behind."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    padding = (mask == 0).sum(dim=-1).tolist()
    return {
        k: torch.stack([row.roll(n) for row, n in zip(v, padding, strict=True)]) if v.shape == mask.shape else v
        for k, v in batch.items()
    }


Ran = tuple[bool, Raised | None, routers.Routed | None]


def run(model: nn.Module, batch: step.Batch, *, training: bool, autocast: torch.dtype | None) -> Ran:
    """Whether every output of one forward is finite, what it raised (None if nothing), and its logits. No dropout."""
    inputs = step.feed(model, batch)
    model.train(training)
    device = step.device(batch).type
    context: Any = torch.autocast(device, dtype=autocast) if autocast else nullcontext()
    try:
        with torch.set_grad_enabled(training), context, switches.seeded(0, batch), switches.dropout(model, 0.0):
            output, routes = routers.routed(model, lambda: model(**inputs))
    except Exception as error:
        return False, Raised.of(error), None
    floating = [t for t in tensors(dict(output)) if t.is_floating_point() and t.numel()]
    # -inf is a mask's way to say "never": only NaN and a loss or logits that overflow are wrong.
    finite = bool(floating) and all(bool(torch.isfinite(t).all()) for t in floating[:2])
    return finite, None, routers.Routed(output.logits.detach(), routes)


def _fed(batch: step.Batch) -> Mapping[str, step.Batch]:
    """The batch with its mask, if it has one, and without."""
    masked: dict[str, step.Batch] = {"with mask": batch} if "attention_mask" in batch else {}
    return {**masked, "no mask": {k: v for k, v in batch.items() if k != "attention_mask"}}


def everywhere(model: nn.Module, batch: step.Batch, half: torch.dtype) -> Iterator[Forward]:
    """A forward under every condition, each computed when iterated over. The model is used up: eval mode may repack weights."""
    fed = _fed(batch)
    for training, (mask, inputs), auto in product((True, False), fed.items(), (True, False)):
        condition = f"{'train' if training else 'eval'}, {mask}, {'autocast' if auto else 'no autocast'}"
        yield Forward(condition, auto, *run(model, inputs, training=training, autocast=half if auto else None))
    if not bool(batch.get("attention_mask", torch.ones(1)).all()):
        padded = run(model, left_padded(batch), training=False, autocast=None)
        yield Forward("eval, left padding, no autocast", False, *padded, optional=True)
    if "input_ids" in batch:
        yield Forward(EMBEDDED, False, *embedded(model, batch), optional=True)
    can = getattr(model, "can_generate", None)
    if can and can():
        yield Forward("eval, token by token, no autocast", False, *token_by_token(model, batch), optional=True)


def embedded(model: Any, batch: step.Batch) -> Ran:
    """As ``run`` in training, of what the embedding makes of the ids; that a gradient comes back to it belongs to it."""
    inputs = step.feed(model, batch)
    model.train().requires_grad_(False)  # gradients of a base that nobody froze take as much memory as it does
    try:
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_(True)
        with switches.seeded(0, batch), switches.dropout(model, 0.0):
            output, routes = routers.routed(model, lambda: model(**inputs, inputs_embeds=embeddings))
            output.loss.backward()
    except Exception as error:
        return False, Raised.of(error), None
    finally:
        step.clear_gradients(model)
    raised = None if embeddings.grad is not None else Raised("", "no gradient comes back to the embeddings")
    return bool(torch.isfinite(output.logits).all()), raised, routers.Routed(output.logits.detach(), routes)


class _Forced(LogitsProcessor):
    """Has every model take the same tokens: which is likeliest hangs on rounding."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -math.inf)
        forced[:, self._tokens.pop(0)] = 0
        return forced


def token_by_token(model: Any, batch: step.Batch) -> Ran:
    """As ``run``, of a few tokens with a cache: (rows, steps, vocabulary)."""
    model.eval()
    fed = step.feed(model, left_padded(batch))
    inputs = {k: v for k, v in fed.items() if k not in ("labels", "decoder_input_ids")}
    end = model.generation_config.eos_token_id
    plain = (t for t in count() if t not in (end if isinstance(end, list) else [end]))
    try:
        with torch.no_grad():
            output, routes = routers.routed(
                model,
                lambda: model.generate(
                    **inputs,
                    max_new_tokens=TOKENS,
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    logits_processor=LogitsProcessorList([_Forced(islice(plain, TOKENS))]),
                    output_logits=True,
                    return_dict_in_generate=True,
                ),
            )
        logits = torch.stack(list(output.logits), dim=1)
    except Exception as error:
        return False, Raised.of(error), None
    return bool(torch.isfinite(logits).all()), None, routers.Routed(logits, routes)


def forward_logits(model: nn.Module, batch: step.Batch, autocast: step.Autocast) -> torch.Tensor:
    """Logits of one forward without gradients or dropout, in train mode: in eval mode kernels may repack weights."""
    with switches.attributes(*((m, "training", m.training) for m in model.modules())):
        model.train()
        with torch.no_grad(), switches.checkpointing_off(model), switches.dropout(model, 0.0), autocast():
            logits = model(**step.feed(model, batch)).logits
    if not isinstance(logits, torch.Tensor):
        raise TypeError("the model's output has no logits tensor")
    return logits.detach()


class Everywhere:
    """The forwards of one model under every condition; those in eval mode run when they are first read."""

    def __init__(self, model: nn.Module, batch: step.Batch, half: torch.dtype) -> None:
        others = everywhere(model, batch, half)
        self.in_training = list(islice(others, 2 * len(_fed(batch))))
        self._others: Iterator[Forward] | None = others  # which keeps the model
        self._all = self.in_training

    @property
    def all(self) -> Sequence[Forward]:
        """Those in train mode that are fed the batch are the first ones."""
        if self._others is not None:
            self._all, self._others = [*self.in_training, *self._others], None
        return self._all


def compare(prepared: Iterable[Forward], base: Sequence[Forward], among: Sequence[Forward]) -> Iterator[ForwardFacts]:
    """The prepared model's forwards beside the base's, each when it is iterated over: one has its logits in memory.

    ``among`` are the base's under other conditions too, which show what a cast and a step into eval mode make of logits.
    """
    uncast = {b.condition.replace("no autocast", "autocast"): b.routed for b in among if not b.autocast}
    trained = {bare.condition.replace("train", "eval"): bare.routed for bare in among if "train" in bare.condition}
    steps = {b.condition: _apart(b.routed, trained.get(b.condition)) or 0.0 for b in among if b.finite}
    # In train there is no step; what has no counterpart in train is taken to be as far from it as the farthest.
    farthest = max(steps.values(), default=0.0)
    for mine, bare in zip(prepared, base, strict=True):
        if not (bare.optional and (bare.raised or not bare.finite)):
            yield ForwardFacts(
                condition=mine.condition,
                autocast=mine.autocast,
                finite=mine.finite,
                raised=mine.raised,
                base_raised=bare.raised,
                base_finite=bare.finite,
                apart=_apart(mine.routed, bare.routed) if mine.finite and bare.finite else None,
                base_cast=(_apart(bare.routed, uncast.get(bare.condition)) or 0.0) if bare.finite else 0.0,
                base_step=0.0 if "train" in bare.condition else steps.get(bare.condition) or farthest,
            )


def beside_wide(compared: Sequence[ForwardFacts], wide: Callable[[], Iterable[Forward]]) -> Sequence[ForwardFacts]:
    """The same forwards with what the float32 model's raised; ``wide`` runs those where the prepared model's raise alone."""
    if not any(f.raised and not f.base_raised for f in compared):
        return compared
    raised = {f.condition: f.raised for f in wide()}
    return [replace(f, wide_raised=raised.get(f.condition)) for f in compared]


def _apart(prepared: routers.Routed | None, base: routers.Routed | None) -> float | None:
    """How far logits are from others, relative, over the tokens whose experts are the same; None where none are."""
    if prepared is None or base is None:
        return None
    ours, theirs = prepared.logits, base.logits
    if any(not torch.equal(a, b) for a, b in zip(prepared.routes, base.routes, strict=True)):
        if any(route.shape[0] != theirs.shape[:-1].numel() for route in base.routes):
            return None
        keep = routers.unmoved(theirs, base.routes, prepared.routes)
        ours, theirs = ours[keep], theirs[keep]
    if not theirs.numel():
        return None
    apart, size = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (ours.float() - theirs.float(), theirs))
    return float(apart / size)


def evaluate(model: nn.Module, batch: step.Batch, autocast: step.Autocast) -> ForwardFacts:
    """A forward in eval mode; the model is in eval mode afterwards."""
    model.eval()
    try:
        with torch.no_grad(), autocast():
            finite, raised = bool(torch.isfinite(model(**step.feed(model, batch)).logits).all()), None
    except Exception as error:
        finite, raised = False, Raised.of(error)
    return ForwardFacts(condition="eval, the whole model", autocast=False, finite=finite, raised=raised)


def generate(model: Any, batch: Mapping[str, torch.Tensor]) -> ForwardFacts:
    """A short greedy generation after training, in eval mode; the model is used up."""
    model.eval()
    first = first_rows(step.feed(model, batch), 1)
    inputs = {k: v for k, v in first.items() if k not in ("labels", "decoder_input_ids")}
    try:
        with torch.no_grad():
            finite, raised = model.generate(**inputs, max_new_tokens=2, do_sample=False).numel() > 0, None
    except Exception as error:
        finite, raised = False, Raised.of(error)
    return ForwardFacts(condition="generate", autocast=False, finite=finite, raised=raised)
