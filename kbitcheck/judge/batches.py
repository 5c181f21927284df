"""KB707, KB713, KB714, KB721 and KB723: what the batches of a training script teach."""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, MicroBatch, Teaching, WatchedRun, WatchedStep
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule
from kbitcheck.judge.watched import run_of

SAME = 1e-3  # weights of losses are quotients of small numbers, in a loss's dtype


@rule("KB707", "accumulates", Level.MUST)
def accumulates(facts: Facts) -> Iterable[Observation]:
    """The losses of accumulated batches are divided once: by their number, or by the number of tokens in all of them; and no
    gradient is cleared between them.

    Two losses that are added up, each with its own backward, may be those of two tasks: a note. So is a loss that is
    computed outside the model, if the weights of its tokens add up to more than one. A step of fewer batches than others, as at the
    end of an epoch, may be divided by the number of the others.

    Why: divided twice, every gradient is too small by the number of batches, and a gradient norm that is clipped to one hides it; not
    divided, it is too large, and what clips it takes the same part of each step. Cleared before each backward, the gradient is that of
    the last batch, divided by the number of all.
    Symptom: a run with accumulation that learns as at a learning rate several times smaller, or larger.
    Fix: pass ``num_items_in_batch`` to the model or divide its loss, and never both; a Trainer does not divide what a ``compute_loss``
    of your own returns if that takes ``num_items_in_batch``. Clear gradients after the optimizer's step alone.
    Sources: transformers#34191, transformers#34198, trl#2175.
    """
    judged = False
    steps = run_of(facts).steps
    most = max((len(step.batches) for step in steps), default=0)
    for number, step in enumerate(steps, start=1):
        weights = [batch.weight for batch in step.batches if batch.weight is not None]
        if len(weights) < 2 or len(weights) < len(step.batches):
            continue
        judged = True
        yield _divided(number, step.batches, weights, most)
        if shared := _shared(step, weights):
            yield Observation(f"step {number}", "the sum of all batches' gradients", shared, ok=False)
    if (note := _summed(steps)) and not judged:
        judged = True
        yield Observation("loss", "a mean over tokens", note, ok=True, note=note)
    if not judged:
        raise NotApplicable("no optimizer step adds up several batches whose losses can be seen")


def _summed(steps: Iterable[WatchedStep]) -> str:
    """What is said of a loss outside the model that is no mean; empty where it is one."""
    several = [_outside(step) for step in steps]
    weights = [weight for each in several for weight in each if weight is not None]
    least = min(weights, default=0.0)
    if least > 1 + SAME:
        return f"the weights of the tokens of a batch add up to at least {least:.3g}, those of a mean to 1: is the loss a sum over tokens?"
    whole = [sum(w for w in each if w is not None) for each in several if len(each) > 1 and None not in each]
    if whole and min(whole) > 1 + SAME:
        return (
            f"the weights of the tokens of accumulated batches add up to at least {min(whole):.3g}, those of a mean to 1: are their "
            "losses divided by their number?"
        )
    return ""


def _outside(step: WatchedStep) -> list[float | None]:
    """The weights of the tokens of batches whose loss is computed outside the model, each with a backward of its own."""
    taught = [(b.follows, b.teaching) for b in step.batches if b.weight is None]
    seen = [(follows, teaching.weight) for follows, teaching in taught if teaching is not None]
    return [weight for n, (follows, weight) in enumerate(seen) if follows or not n]


def _shared(step: WatchedStep, weights: list[float]) -> str:
    """Which batches of a step had their gradients cleared, though each loss is a share of the step's; empty where none had."""
    share = [b.counted or _is(w, 1 / len(weights)) for b, w in zip(step.batches, weights, strict=True)]
    lost = [n for n, (one, other) in enumerate(pairwise(step.batches), 1) if other.cleared and one.labels != 0]
    used = any(update.gradient == "ok" for update in step.updates.values())
    return f"cleared after batch {', '.join(map(str, lost))} of {len(weights)}" if lost and used and all(share) else ""


TASKS = 2  # losses, which may be those of two tasks


def _divided(number: int, batches: tuple[MicroBatch, ...], weights: list[float], most: int) -> Observation:
    """``most``: the batches of the step that has most; fewer are left over at the end of an epoch, and may have the weight of the others."""
    count, weight = len(weights), sum(weights) / len(weights)
    once = 1.0 if batches[0].counted else 1 / count
    where, whole = (
        f"step {number}: losses of {count} batches",
        not batches[0].counted and all(_is(w, 1) for w in weights),
    )
    if whole and all(batch.follows for batch in batches[1:]):
        note = f"the losses of {count} batches are added up in each step; of one batch in {count} parts, they would be divided by {count}"
        ok, expected = count <= TASKS, f"divided by {count}"
        return Observation(where, expected, "not divided", ok=ok, note=note if ok else "")
    shares = (
        min(weights) * max(weights) > 0
    )  # losses of both signs, as where some texts are unlearned, are no shares of one
    left_over = count < most and _is(abs(weight), 1 / most)
    twice = shares and not left_over and _is(abs(weight), once / count)
    expected = "divided by the tokens of all" if batches[0].counted else f"divided by {count}"
    times = "divided by their number once more" if twice else f"weighted by {weight:.3g}"
    return Observation(where, expected, times, ok=not twice)


def _is(weight: float, expected: float) -> bool:
    return math.isclose(weight, expected, rel_tol=SAME)


@rule("KB713", "loss-finite", Level.MUST)
def loss_finite(facts: Facts) -> Iterable[Observation]:
    """The loss of every batch is finite.

    Why: a loss that is not finite makes the weights so, or a gradient scaler leaves its step out.
    Symptom: "loss: nan"; "loss: 0.0" in a trainer that filters NaN.
    Fix: look at labels first (KB714), then at dtypes, at the learning rate, and at rows without any token.
    Sources: transformers#25065, peft#389.
    """
    judged = [(n, b) for n, step in enumerate(run_of(facts).steps, 1) for b in step.batches if b.loss is not None]
    if not judged:
        raise NotApplicable("the model's output has no loss")
    for number, batch in judged:
        finite = batch.loss is not None and math.isfinite(batch.loss)
        yield Observation(f"step {number}", "a finite loss", str(batch.loss), ok=finite)


@rule("KB714", "labels-count", Level.MUST)
def labels_count(facts: Facts) -> Iterable[Observation]:
    """The labels of every batch have a token that is not ignored, and are not shifted: transformers' models shift them. A loss
    that is computed outside the model pulls each token's logits to the next token, and not to that token itself.

    Why: a template that does not match, or a prompt longer than the maximal length, masks every label. With labels that are
    shifted twice, a model learns to leave every other token out.
    Symptom: a loss that is NaN or 0; "loss: 0.0, grad_norm: nan"; a loss that falls, and answers without sense.
    Fix: print one row of ``labels``: the tokens of the answer must not be -100, and stand where they stand in ``input_ids``.
    Sources: trl#1385, LLaMA-Factory#2533; transformers documentation of ``labels`` of causal models.
    """
    judged = [(n, b) for n, step in enumerate(run_of(facts).steps, 1) for b in step.batches if b.labels is not None]
    copied = [
        (n, b)
        for n, step in enumerate(run_of(facts).steps, 1)
        for b in step.batches
        if b.teaching and b.teaching.copied
    ]
    if not judged and not copied:
        raise NotApplicable("the model was passed no labels")
    for number, batch in judged:
        yield Observation(f"step {number}", "a label", f"{batch.labels:,} labels", ok=bool(batch.labels))
        if batch.shifted:
            actual = "each is the token after the one in its place, and the model shifts them once more"
            yield Observation(f"step {number}", "labels in the places of their tokens", actual, ok=False)
    for number, _ in copied:
        actual = "the loss is not shifted, or the wrong way: each token learns to repeat itself or the one before it"
        yield Observation(f"step {number}", "each token learns the next one", actual, ok=False)


ODD = {
    "padding": ("labels of padding are ignored", "labels count where attention_mask is 0"),
    "ignored": ("tokens whose label is -100 teach nothing", "the loss is computed of them as of the others"),
    "ends": ("the end of a text is learned", "the token before an end counts, and no end-of-text token does"),
    "unmasked": (
        "padding that nothing attends to",
        "rows begin with padding, and attention_mask has no 0 there: every token attends to it",
    ),
    "positions": ("positions that differ", "position_ids has one position for all tokens of a row"),
    "read": (
        "decoder_input_ids one token behind the labels",
        "decoder_input_ids has each label in its own place: the decoder reads what it has to predict",
    ),
    "others": ("labels of their own row", "most labels are neither the token in their place nor the next one"),
}
REPEATED = 3  # batches


@rule("KB721", "batch-is-meant", Level.SHOULD)
def batch_is_meant(facts: Facts) -> Iterable[Observation]:
    """The tokens of a batch are what they seem: padding and ignored labels teach nothing, no token attends to padding on its left, the
    end of a text is learned, tokens have positions of their own, labels are tokens of their row that a decoder has not read yet, and
    dropout draws anew in each batch. Along an optimizer's steps, from its first on, the loss of the labels falls in the first order: the
    gradient times the change of the weights is below zero.

    If every batch has the same tokens, a note says so.

    Why: all of it trains, and the loss falls. A model whose padding token is its end-of-text token, and whose labels ignore
    padding, never learns to stop.
    Symptom: answers that do not end; answers of padding; a loss far lower than that of an evaluation.
    Fix: set labels to -100 where ``attention_mask`` is 0, and not where a token equals the padding token; pass ``attention_mask``;
    leave ``position_ids`` to the model, or count them from each text's start. Leave labels of -100 out of a loss of your own. Seed
    once, before the loop.
    Sources: transformers ``DataCollatorForLanguageModeling``, which ignores each label that is the padding token.
    """
    batches = [(n, b) for n, step in enumerate(run_of(facts).steps, 1) for b in step.batches if b.odd is not None]
    if not batches:
        raise NotApplicable("no batch had tokens and labels beside them")
    repeated = len(batches) >= REPEATED and all(batch.repeated for _, batch in batches[1:])
    note = f"the same tokens in all {len(batches)} batches" if repeated else ""
    yield from _climbs(run_of(facts))
    if len(batches) >= REPEATED and all(batch.redrawn for _, batch in batches[1:]):
        actual = f"the same random state before each of {len(batches)} batches: the same is dropped"
        yield Observation("dropout", "draws anew in each batch", actual, ok=False)
    for number, batch in batches:
        for kind in batch.odd or ():
            expected, actual = ODD[kind]
            yield Observation(f"step {number}", expected, actual, ok=False)
        if not batch.odd:
            yield Observation(f"step {number}", "tokens as they should be", "nothing odd", ok=True, note=note)
            note = ""


def _climbs(run: WatchedRun) -> Iterator[Observation]:
    """Steps that all raise the loss of the model. The first has no averages of gradients from before the run, which may point elsewhere."""
    rises = [_rise(step) for step in run.steps if not step.skipped]
    judged = [rise for rise in rises if rise]
    if judged and all(rise is not None for rise in rises) and min(judged) > 0 and not run.steps[0].remembered:
        rates = ", ".join(f"{rise:.1e}" for rise in judged)
        actual = f"by the gradients it rises, by {rates}: it is maximized, or its sign is wrong"
        yield Observation("loss of the labels", "falls along the steps", actual, ok=False)


def _rise(step: WatchedStep) -> float | None:
    """By how much the model's loss rises in the first order; None where it is not seen, or has both signs, as of pairs."""
    weights = [batch.weight for batch in step.batches if batch.labels and batch.weight is not None]
    if len(weights) < len(step.batches) or not weights or min(weights) * max(weights) <= 0:
        return None
    return sum(update.climb for update in step.updates.values()) * len(weights) / sum(weights)


@rule("KB723", "batch-teaches", Level.MUST)
def batch_teaches(facts: Facts) -> Iterable[Observation]:
    """Every row of a batch whose labels count has a gradient at the logits, and what has a large one there has one behind the blocks.

    Compared are rows and their last tokens behind every block, and all tokens behind the last one. Noted are rows without a gradient at
    the logits in every batch where the loss is computed outside the model, and forwards with labels in train mode that take no gradients.

    Why: what is detached, or computed under ``no_grad``, is in the loss and teaches nothing.
    Symptom: a loss that falls as with a smaller batch; a gradient norm that is too small.
    Fix: look for ``detach``, ``no_grad`` and ``.data`` between the model's outputs and the loss, and in hooks.
    Sources: torch documentation of ``torch.no_grad`` and ``Tensor.detach``; specification KB723.
    """
    judged = [
        (n, b, b.teaching) for n, s in enumerate(run_of(facts).steps, 1) for b in s.batches if b.teaching is not None
    ]
    if not judged:
        raise NotApplicable("no gradient of logits was seen")
    for number, batch, seen in judged:
        silent = seen.silent if batch.weight is not None else 0
        actual = f"{silent} of {seen.rows} have none" if silent else "there"
        yield Observation.either(f"step {number}", "a gradient at the logits of each row", actual, ok=not silent)
        for cut in seen.cut:
            actual = f"{cut.lost:,} of {cut.of:,} {cut.what} have none"
            yield Observation(f"{cut.place} (step {number})", "the gradient that the logits have", actual, ok=False)
    for note in _beside([(batch, seen) for _, batch, seen in judged]):
        yield Observation("batches", "gradients for all of them", note, ok=True, note=note)


def _beside(judged: list[tuple[MicroBatch, Teaching]]) -> Iterator[str]:
    """What may be meant so, or not."""
    outside = [seen for batch, seen in judged if batch.weight is None]
    if outside and all(seen.silent for seen in outside):
        yield f"{outside[0].silent} of {outside[0].rows} rows have no gradient at the logits, and the like in every batch"
    if count := sum(batch.beside for batch, _ in judged):
        yield f"{count} forwards with labels, in train mode, took no gradients: what they add to a loss teaches nothing"
