"""KB4xx: gradient checkpointing that is asked for happens, saves memory, and changes nothing else."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import unless_unprepared
from kbitcheck.judge.gradients import needs_checkpointing


@rule("KB401", "on-when-requested", Level.MUST)
def on_when_requested(facts: Facts) -> Iterable[Observation]:
    """If checkpointing is requested, it is enabled in every block that supports it, in every tower.

    Why: some preparations enable it only if the model has certain attributes. Some quantizers and wrappers do not set
    them, and checkpointing is silently off.
    Symptom: out of memory with checkpointing "on"; no message at all.
    Fix: find quantized layers by type, and check the blocks' flags after enabling.
    Sources: peft#760, peft#513, trl#728, transformers#26221, ms-swift#9945.
    """
    if facts.checkpointing == "off":
        raise NotApplicable("checkpointing was not asked for")
    if not facts.base.can_checkpoint:
        why = f"{facts.base.cls} does not support checkpointing"
        none = Observation(facts.base.cls, "blocks that checkpoint", why, ok=False)
        yield none.attributed(Party.MODEL, "its class says so: supports_gradient_checkpointing")
        return
    for block in facts.prepared.blocks:
        on = block.checkpointing
        yield Observation(block.name, "checkpointing on", f"its flag is {on}", ok=on is True)


@rule("KB402", "off-when-not-requested", Level.MUST)
def off_when_not_requested(facts: Facts) -> Iterable[Observation]:
    """If checkpointing is not requested, preparation enables it nowhere, and no block recomputes.

    Why: a default that overrides a configured "off" costs a third of the speed, and breaks methods that do not work
    with checkpointing.
    Symptom: slower steps than configured; "PREFIX_TUNING does not work with gradient checkpointing".
    Fix: obey ``use_gradient_checkpointing=False``.
    Sources: Soup#797, unsloth-zoo#433, peft#869.
    """
    if facts.checkpointing != "off":
        raise NotApplicable("checkpointing was asked for")
    for m in facts.prepared.modules.values():
        before = facts.base.modules.get(m.name)
        if m.checkpointing is not None:
            turned_on = m.checkpointing and not (before is not None and before.checkpointing)
            where = m.name or facts.prepared.cls
            yield Observation(where, "its flag off", f"its flag is {m.checkpointing}", ok=not turned_on)
    if facts.by_hand:
        return
    for block in facts.run.blocks.values():
        yield Observation(block.name, "no recompute", f"recomputed {block.recomputed} times", ok=block.recomputed == 0)


@rule("KB403", "blocks-recompute", Level.MUST)
def blocks_recompute(facts: Facts) -> Iterable[Observation]:
    """In a training step with checkpointing, every block on a path to the loss runs exactly twice as often as without.

    Why: a flag is no proof. A model in eval mode never recomputes, and neither does a block whose forward bypasses the
    checkpoint.
    Symptom: as much memory as without checkpointing.
    Fix: leave blocks in train mode; set both flag and checkpointing function on every block.
    Sources: peft#120, alpaca_lora_4bit#128, unsloth-zoo#549.
    """
    needs_checkpointing(facts)
    for name, block in facts.run.blocks.items():
        plain = facts.plain_run.blocks[name]
        if plain.on_path:
            total = block.computed + block.recomputed
            wanted = 2 * plain.computed - plain.without_grad
            ok = total == wanted and block.computed == plain.computed and plain.recomputed == 0
            plainly = f" (plain run: {plain.computed} + {plain.recomputed})" if plain.recomputed else ""
            ran = (block.computed, block.recomputed)
            actual = f"{block.computed} + {block.recomputed} in backward{plainly}"
            observation = Observation(name, f"computed {wanted} times", actual, ok=ok)
            yield unless_unprepared(observation, facts, Party.STACK, partial(_ran_so, name, ran))


def _ran_so(name: str, ran: tuple[int, int], facts: Facts) -> bool:
    block = facts.run.blocks[name]
    return (block.computed, block.recomputed) == ran


@rule("KB404", "kwargs-honoured", Level.MUST)
def kwargs_honoured(facts: Facts) -> Iterable[Observation]:
    """``use_reentrant``, ``preserve_rng_state`` and the other arguments reach ``torch.utils.checkpoint``, in whichever form
    they are passed, and are those of the call, whatever the caller does with the dictionary afterwards.

    Why: the mode decides whether DDP or ZeRO-3 works; the effect of a dropped argument shows hours later.
    Symptom: "Expected to mark a variable ready only once"; a warning that ``use_reentrant`` should be passed.
    Fix: pass ``gradient_checkpointing_kwargs`` through unchanged.
    Sources: transformers#28536, trl#480, axolotl#1021.
    """
    needs_checkpointing(facts)
    asked, run = facts.honoured.arguments, facts.honoured.run
    if not run.checkpoints:
        yield Observation("torch.utils.checkpoint", "called", "never called", ok=False)
    for key, value in asked.items():
        seen = sorted({c.get(key, "not passed") for c in run.checkpoints})
        if seen:
            yield Observation(f"{key}={value}", value, ", ".join(seen), ok=seen == [value])
    for text, form in facts.call_forms.items():
        kept = form.asked if form.raised or form.kept is None else form.kept  # what raises is KB501's
        for key, value in form.asked.items():
            got = kept.get(key, "not passed")
            yield Observation(f"{key} of {text}", value, got, ok=got == value)
    if facts.checkpointing in ("reentrant", "non-reentrant"):
        mode = str(facts.checkpointing == "reentrant")
        for used in sorted({c["use_reentrant"] for c in facts.run.checkpoints}):
            yield Observation("use_reentrant in the case's own run", mode, used, ok=used == mode)


@rule("KB405", "memory-saved", Level.MUST)
def memory_saved(facts: Facts) -> Iterable[Observation]:
    """Between forward and backward, no more activation bytes are held than checkpointing needs.

    Allowed are the tensor arguments and results of the blocks, each counted once, the activations outside the
    blocks, and the saved random states, all measured in the same model without checkpointing. In the backward,
    blocks are recomputed one at a time, the last block first.

    Why: checkpointing exists to save memory, and can look right in every other respect while it saves none.
    Symptom: out of memory, or no saving, with checkpointing on.
    Fix: checkpoint each block separately; keep no reference to activations.
    Sources: axolotl#1021, accelerate#389, bitsandbytes#2005; int8 under non-reentrant:
    docs/findings/int8_keeps_inputs.py.
    """
    needs_checkpointing(facts)
    m = facts.memory
    # Nothing to save: blocks so small that what they make is what they hand on.
    if m.blocks <= 0:
        raise NotApplicable("the blocks hold nothing beyond their inputs and results, even without checkpointing")
    over = m.held - m.allowed
    expected = f"at most {m.allowed:,} bytes (plain: {m.plain:,})"
    held = Observation("held between forward and backward", expected, f"{m.held:,} bytes", ok=over <= 0)
    keep = f"bare quantized layers inside a non-reentrant checkpoint keep {m.stack:,} bytes of their inputs"
    yield held.attributed(Party.STACK, keep) if 0 < over <= m.stack else held
    for tower in dict.fromkeys(b.tower for b in facts.run.blocks.values()):
        seen = [n for n in dict.fromkeys(facts.run.order) if facts.run.blocks[n].tower == tower]
        forward = [n for n in facts.run.blocks if n in seen]
        if len(seen) > 1:
            expected = "blocks recomputed one at a time, last first"
            yield Observation(f"backward of {tower}", expected, " ".join(seen), ok=seen == forward[::-1])


@rule("KB406", "memory-scales", Level.SHOULD)
def memory_scales(facts: Facts) -> Iterable[Observation]:
    """Each block adds about the size of its input to the activations that are held, not the size of all its
    activations.

    Why: depth then costs almost no memory, so that long sequences fit.
    Symptom: memory that grows with depth as if checkpointing were off in some blocks.
    Fix: checkpoint each block separately, and keep no reference to its activations (KB405).
    Sources: specification KB406.
    """
    needs_checkpointing(facts)
    m = facts.memory
    if not m.steps:
        raise NotApplicable("a single block has no increments")
    # Where the next entry is another tower's block, what lies between is not the block's.
    tower = {name: block.tower for name, block in facts.run.blocks.items()}
    names = [n for n, following in pairwise(m.steps) if n in m.step_allowed and tower[n] == tower[following]]
    if not names:
        raise NotApplicable("a single block in each tower has no increments")
    for name in names:
        over = m.steps[name] - m.step_allowed[name]
        stack = m.step_stack.get(name, 0)
        expected = f"adds at most {m.step_allowed[name]:,} bytes"
        added = Observation(name, expected, f"{m.steps[name]:,} bytes", ok=over <= 0)
        keep = f"this block's bare quantized layers keep {stack:,} bytes of their inputs"
        yield added.attributed(Party.STACK, keep) if 0 < over <= stack else added


@rule("KB407", "reentrant-explicit", Level.SHOULD)
def reentrant_explicit(facts: Facts) -> Iterable[Observation]:
    """``use_reentrant`` is passed explicitly, so that torch does not warn that it is missing.

    Why: without the argument the mode is reentrant today and an error in a later torch, and differs from transformers'
    default.
    Symptom: "the use_reentrant parameter should be passed explicitly" on every run.
    Fix: add ``use_reentrant`` if the caller did not pass it; note that ``{}`` is not ``None``.
    Sources: transformers#28536, transformers#43203, axolotl#1021.
    """
    needs_checkpointing(facts)
    heard = [w for w in facts.run.warnings if "use_reentrant" in w]
    yield Observation("training step", "no warning about use_reentrant", heard[0] if heard else "none", ok=not heard)


@rule("KB408", "cache-off-in-training", Level.SHOULD)
def cache_off_in_training(facts: Facts) -> Iterable[Observation]:
    """No key/value cache is held in a checkpointed training forward; ``generate`` works afterwards.

    Why: a cache in training wastes memory and breaks the recompute.
    Symptom: "use_cache=True is incompatible with gradient checkpointing"; a CheckpointError.
    Fix: leave the cache to transformers, or switch ``use_cache`` off for training and restore it afterwards.
    Sources: transformers#34928, unsloth-zoo#715, trl#3891.
    """
    needs_checkpointing(facts)
    held = facts.run.cache_held is True
    yield Observation("training forward", "no cache", "a cache is held" if held else "none", ok=not held)
    if facts.generator:
        g = facts.generates
        ok = g.finite and not g.raised
        generation = Observation("generate", "works after training", str(g.raised or "works"), ok=ok).of(g.raised)
        yield unless_unprepared(generation, facts, Party.MODEL, lambda base: base.generates.raised == g.raised)


@rule("KB409", "train-eval-untouched", Level.MUST)
def train_eval_untouched(facts: Facts) -> Iterable[Observation]:
    """Preparation changes no module's ``training`` flag.

    Why: a model switched to eval mode never recomputes and applies no dropout; a model switched to train mode
    generates with dropout.
    Symptom: checkpointing that does nothing; noisy evaluation.
    Fix: call neither ``train`` nor ``eval``.
    Sources: peft#120, diffusers#1848.
    """
    for text, call in (("as loaded", facts.default_call), ("all in train", facts.positional_call)):
        changed = ", ".join(call.modes_changed[:4])
        yield Observation(f"a model {text}", "no mode changed", changed or "none changed", ok=not changed)
    for name, flag in facts.training_flags.items():
        now = facts.prepared.modules.get(name)
        if now is not None:
            expected, actual = ("train" if f else "eval" for f in (flag, now.training))
            yield Observation(name or facts.prepared.cls, expected, actual, ok=now.training is flag)


@rule("KB410", "state-changes-once", Level.MUST)
def state_changes_once(facts: Facts) -> Iterable[Observation]:
    """A buffer that a training forward changes is changed once a step, checkpointed or not.

    Why: the recompute runs the forward again, and with it whatever the forward writes.
    Symptom: running statistics or the load of a router counted twice; a run that depends on checkpointing.
    Fix: write state outside the blocks that are checkpointed, or not while gradients are computed again.
    Sources: Automodel#3247.
    """
    needs_checkpointing(facts)
    changes = facts.state_changes
    yield Observation("buffers", "changed once a step, or never", f"{len(changes)} change", ok=True)
    for name, (plain, checkpointed) in changes.items():
        actual = "as after one" if plain == checkpointed else "another value"
        once = Observation(name, "as after a step without checkpointing", actual, ok=plain == checkpointed)
        yield unless_unprepared(once, facts, Party.MODEL, partial(_changed_twice, name))


def _changed_twice(name: str, base: Facts) -> bool:
    plain, checkpointed = base.state_changes.get(name, ("", ""))
    return plain != checkpointed
