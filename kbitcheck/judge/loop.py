"""KB716 to KB720, KB722 and KB726: what a training loop puts round its steps: a cache, a gradient scaler, recomputes, warnings."""

import math
from collections.abc import Iterable

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, WatchedStep
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.gradients import needs_checkpointing
from kbitcheck.judge.watched import run_of


@rule("KB716", "cache-not-trained", Level.SHOULD)
def cache_not_trained(facts: Facts) -> Iterable[Observation]:
    """No key/value cache is made in a checkpointed training forward, and no caller asks for one.

    Why: a cache holds keys and values of every layer, which checkpointing is meant to free, and breaks the recompute.
    Symptom: "`use_cache=True` is incompatible with gradient checkpointing"; out of memory in training.
    Fix: pass ``use_cache=False``, or set it in the configuration, while training.
    Sources: transformers#34928, trl#3891.
    """
    run = run_of(facts)
    if facts.checkpointing == "off":
        raise NotApplicable("checkpointing is off")
    yield Observation.either("training forward", "no cache", run.cached, ok=not run.cached)


# The root of the largest float32: the square of a larger gradient, which Adam keeps, is not finite. What overflows a dtype only if
# it is larger than this times the scale overflows at a scale of one, too.
SQUARED = 2.0**64


@rule("KB717", "scaler-lets-steps-pass", Level.MUST)
def scaler_lets_steps_pass(facts: Facts) -> Iterable[Observation]:
    """A gradient scaler does not skip every step, and the gradients that it unscales are float32 ones as the backward left them, each of
    a scaled loss.

    One step that is taken is enough. Where every step is skipped, that is a note as long as the scale still falls, is above
    one, and can be what makes gradients overflow: in float16, not in bfloat16 or float32 at common scales.

    Why: a scaler says nothing when it skips a step. Gradients that are clipped before they are unscaled are clipped by a norm
    that is as many times too large as the scale.
    Symptom: a loss that only changes with the batch; "Attempting to unscale FP16 gradients."; a gradient norm of exactly the
    maximum over the scale.
    Fix: keep what trains in float32; call ``scaler.unscale_(optimizer)`` before clipping; look at KB713 where no step is taken.
    Sources: torch documentation "Automatic Mixed Precision examples"; peft#341, transformers#23165; specification KB211.
    """
    scaler = facts.watched.scaler
    if scaler is None:
        raise NotApplicable("no gradient scaler is used")
    taken = scaler.steps > scaler.skipped
    falls = scaler.steps < 2 or scaler.scales[-1] < scaler.scales[0]
    by_scale = scaler.scales and scaler.scales[-1] > 1 and scaler.limit / scaler.scales[-1] < SQUARED
    actual, note = f"{scaler.skipped} of {scaler.steps} skipped", ""
    if scaler.steps and not taken:
        actual += f" at scales from {scaler.scales[0]:g} to {scaler.scales[-1]:g}"
        note = f"the gradient scaler skipped all {scaler.steps} steps: --steps watches until one is taken"
    ok = not scaler.steps or taken or bool(falls and by_scale)
    yield Observation("gradient scaler", "a step that is taken", actual, ok=ok, note=note if ok else "")
    for number, step in enumerate(facts.watched.steps, start=1):
        if unscaled := _unscaled(step):
            actual = f"{unscaled} of {len(step.batches)} batches are not scaled, and their gradients are divided by the scale all the same"
            yield Observation(f"step {number}", "each loss scaled", actual, ok=False)
    for name in scaler.float16:
        yield Observation(name, "a float32 gradient", "float16, which cannot be unscaled", ok=False)
    for name in scaler.clipped:
        yield Observation(name, "unscaled before it is clipped", "clipped first", ok=False)


def _unscaled(step: WatchedStep) -> int:
    """The accumulated batches that reached the backward unscaled, though others of the step are scaled and weigh about as much."""
    weights = [(batch.scale, abs(batch.weight)) for batch in step.batches if batch.weight]
    scaled = [(scale, weight) for scale, weight in weights if scale > 1]
    least = min((weight * math.sqrt(scale) for scale, weight in scaled), default=0.0)
    return sum(scale == 1 and weight < least for scale, weight in weights)


@rule("KB718", "steps-recompute", Level.MUST)
def steps_recompute(facts: Facts) -> Iterable[Observation]:
    """In a watched step with checkpointing on, each block on the way to the loss is recomputed in the backward.

    In no later step eval mode switches checkpoints or dropout off.

    Why: a flag is no proof. A model in eval mode recomputes nothing, and neither does a block that a trainer calls past its
    checkpoint; dropout is then off, too, and memory is that of a run without checkpointing.
    Symptom: as much memory as without checkpointing; a run without dropout.
    Fix: call ``model.train()`` before training, and again after each evaluation.
    Sources: peft#120, alpaca_lora_4bit#128.
    """
    steps = facts.watched.steps
    resting = [
        (n, b.resting) for n, step in enumerate(steps, 1) for b in step.batches if b.resting and b.weight is not None
    ]
    if not resting:
        needs_checkpointing(facts)
    if not steps:  # of a case that trains by itself KB403 asks the same
        raise NotApplicable("no step was watched")
    flags = {block.name: block.checkpointing for block in facts.wrapped.blocks}
    ran = {name: block for name, block in facts.run.blocks.items() if block.on_path and flags.get(name)}
    if not ran and not resting:
        raise NotApplicable("in the first forward no block that checkpoints was on the way to a loss")
    for name, block in ran.items():
        training = facts.wrapped.modules[name].training
        actual = "not recomputed" + ("" if training else ": it is in eval mode")
        yield Observation(name, "recomputed in the backward", actual, ok=block.recomputed > 0)
    for number, what in dict.fromkeys(resting):
        yield Observation(f"step {number}", "in train mode", f"{what} are in eval mode", ok=False)


@rule("KB719", "no-grave-warning", Level.SHOULD)
def no_grave_warning(facts: Facts) -> Iterable[Observation]:
    """Among the warnings of the run is none that says that something is not trained, or is computed as was not meant.

    Why: libraries warn once, among dozens of harmless lines, before the first progress bar.
    Symptom: the warning itself.
    Fix: what the warning says; ``None of the inputs have requires_grad=True`` is KB301.
    Sources: peft#295, transformers#26377, bitsandbytes ``Linear4bit.set_compute_type``.
    """
    heard = facts.watched.warnings
    if heard is None:
        raise NotApplicable("warnings were not listened to")
    grave = [warning for warning in heard if warning.grave]
    harmless = [warning for warning in heard if not warning.grave]
    note = "; ".join(warning.text for warning in harmless)
    yield Observation("warnings", "none that is grave", f"{len(grave)} are", ok=True, note=note)
    for warning in grave:
        yield Observation(warning.about, "no such warning", warning.text, ok=False)


@rule("KB720", "gradients-cleared", Level.MUST)
def gradients_cleared(facts: Facts) -> Iterable[Observation]:
    """Gradients that an optimizer's step has used are cleared before the next backward adds to them.

    Why: each step is otherwise taken along the sum of all gradients so far, as with a momentum that forgets nothing.
    Symptom: a gradient norm that grows with every step; a loss that falls, and then swings.
    Fix: call ``optimizer.zero_grad()`` once for each ``optimizer.step()``, with the same parameters.
    Sources: torch documentation of ``Optimizer.zero_grad``; specification KB720.
    """
    steps = [step for step in facts.watched.steps[1:] if any(batch.weight is not None for batch in step.batches)]
    if facts.watched.assumed or not steps:
        raise NotApplicable("no backward of a loss was seen after a step")
    for number, step in enumerate(steps, start=2):
        stale = sum(batch.stale for batch in step.batches)
        actual = f"{stale:,} tensors still have one"
        yield Observation.either(f"step {number}", "no gradient of the step before", actual, ok=not stale)


LEFT = 0.1  # of what a block's modules return: what routers hand out, and what rotary tables are made of


@rule("KB722", "recompute-frees", Level.SHOULD)
def recompute_frees(facts: Facts) -> Iterable[Observation]:
    """In a watched step with checkpointing on, what a block computes inside is freed before the backward, at least nine tenths of it.

    Why: a block that recomputes and is held all the same costs the time of checkpointing and the memory of a step without it.
    bitsandbytes' int8 layers keep their inputs so under non-reentrant checkpointing.
    Symptom: recomputes, and as much memory as without checkpointing.
    Fix: keep no outputs in hooks; with int8 layers pass ``use_reentrant=True``.
    Sources: specification KB405; docs/findings/int8_keeps_inputs.py.
    """
    needs_checkpointing(facts)
    if facts.watched.cached:
        raise NotApplicable("a cache holds keys and values: KB716")
    held = facts.run.held
    if not held:
        raise NotApplicable("no block was seen to return anything")
    for name, (kept, made) in held.items():
        actual = f"{kept:,} of {made:,} bytes"
        seen = Observation(name, f"at most {LEFT:.0%} is held", actual, ok=kept <= LEFT * made)
        rounds = any(layer.rounds_input for n, layer in facts.base.layers.items() if n.startswith(f"{name}."))
        if rounds and "False" in {call.get("use_reentrant") for call in facts.run.checkpoints}:
            yield seen.attributed(Party.STACK, "int8 layers keep their inputs: docs/findings/int8_keeps_inputs.py")
        else:
            yield seen


@rule("KB726", "steps-let-go", Level.SHOULD)
def steps_let_go(facts: Facts) -> Iterable[Observation]:
    """What blocks return in a step is freed two steps later.

    Why: a graph that is retained, or a list of outputs that is never emptied, grows by the activations of a step in every step.
    Symptom: memory that grows with every step, until it is out.
    Fix: leave ``retain_graph`` out; add up ``loss.item()`` or ``loss.detach()``, and not losses; keep no outputs.
    Sources: PyTorch FAQ "My model reports cuda runtime error(2): out of memory"; specification KB726.
    """
    held, count = run_of(facts).outliving
    if not count:
        raise NotApplicable("fewer than three steps were watched, or no block was seen to return anything")
    actual = f"{held:,} of {count:,} are held"
    yield Observation("outputs of blocks", "freed two steps later", actual, ok=2 * held < count)
