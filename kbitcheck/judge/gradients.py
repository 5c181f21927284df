"""KB3xx: gradients reach every adapter, through every quantized layer, and are the right ones."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

from kbitcheck.core.conditions import require_turn
from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import WIDEST, Distance, Facts, Gap, RunFacts, StepOutcome, slope_bound
from kbitcheck.core.facts.blockwise import live_ones
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import unless_bare, unless_unprepared
from kbitcheck.judge.blockwise import gradients_off, measurable, tensors_off

ULPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # from one to the next number


def reentrant(facts: Facts) -> bool:
    """Whether any block was really run under reentrant checkpointing."""
    return any(c["use_reentrant"] == "True" for c in facts.run.checkpoints)


def needs_checkpointing(facts: Facts) -> None:
    """Skip a rule that is about checkpointing where none was asked for or the architecture has none."""
    if facts.checkpointing == "off":
        raise NotApplicable("checkpointing was not asked for")
    if not facts.base.can_checkpoint:
        raise NotApplicable(f"{facts.base.cls} does not support checkpointing")


def live_gradients(facts: Facts) -> dict[str, Gap]:
    """Gradients of the adapters that get one in the float twin: none where dropout left nothing of the only block."""
    if live := live_ones(facts.gradients):
        return live
    raise NotApplicable("no adapter is live even in the float twin")


@rule("KB301", "inputs-require-grad", Level.MUST)
def inputs_require_grad(facts: Facts) -> Iterable[Observation]:
    """Under reentrant checkpointing, the input of the first block of every tower with adapters requires grad.

    Why: reentrant checkpointing records a block only if a positional input requires grad. If the embedding is
    frozen, no input does.
    Symptom: "None of the inputs have requires_grad=True. Gradients will be None", then "element 0 of tensors does
    not require grad"; or no message at all, if something behind the blocks is trainable.
    Fix: hook the input embedding of every tower (patch and audio embeddings, too), so that its output requires
    grad.
    Sources: transformers#26377, transformers#42489, peft#2880, peft#295, trl#835.
    """
    needs_checkpointing(facts)
    if not reentrant(facts):
        raise NotApplicable("checkpointing is not reentrant here, so inputs need not require grad")
    adapted = list(live_gradients(facts))
    first: dict[str, str] = {}
    for block in facts.run.blocks.values():
        first.setdefault(block.tower, block.name)
    inside = [name for tower, name in first.items() if any(f"{tower}." in n for n in adapted)]
    if not inside:
        raise NotApplicable("no adapter is inside a tower")
    for name in inside:
        asks = facts.run.blocks[name].input_requires_grad is True
        yield Observation.either(f"input of {name}", "requires grad", "does not", ok=asks)


@rule("KB302", "adapters-get-gradients", Level.MUST)
@unless_bare
def adapters_get_gradients(facts: Facts) -> Iterable[Observation]:
    """Every live adapter gets a finite, non-zero gradient.

    An adapter is live if it gets a gradient in the float64 twin without checkpointing. A tensor that does not, although another
    one of the same layer's adapter does, or, where none does, the layer's output, is cut off by its own code; KB904
    reports the others.
    Before the step, ``lora_B`` gets random values: if it were zero, half of all gradients would be zero by
    construction.

    Why: an adapter without a gradient is never trained, and no message says so.
    Symptom: ``lora_B`` all zero after training; a falling loss and a model that did not learn.
    Fix: see KB301 and KB303; under reentrant checkpointing pass hidden states positionally.
    Sources: peft#2880, trl#835, ai-toolkit#1054, transformers#41993.
    """
    for name, g in live_gradients(facts).items():
        actual = "no gradient" if g.norm is None else f"norm {g.norm:.3g}" if g.finite else "not finite"
        yield Observation(name, "finite and non-zero", actual, ok=g.norm is not None and g.finite and g.norm > 0)
    for name, other in _cut_off(facts).items():
        yield Observation(name, f"a gradient, as {other} has one", "none, in the float64 twin either", ok=False)


def _cut_off(facts: Facts) -> dict[str, str]:
    """Adapters' tensors without a gradient in the float64 twin, each with what has one beside it.

    Biases are none: one that moves all scores of a softmax alike has no gradient. What is frozen is KB102's.
    """
    wrapped = facts.wrapped
    frozen = {name for name, p in wrapped.parameters.items() if not p.requires_grad}
    layers = {name: wrapped.adapted(name) for name in facts.gradients if not name.endswith("bias")}
    dead = {name for name, layer in layers.items() if layer and not facts.gradients[name].live} - frozen
    if not dead:
        return {}
    beside = {layers[name]: name for name in live_ones(facts.gradients) if name in layers}
    with suppress(Unavailable):
        reached = {name.removesuffix(".base_layer") for name, layer in facts.layer_backwards.items() if layer.reached}
        all_dead = {layers[name] for name in dead} - {layer for name, layer in layers.items() if name not in dead}
        beside |= {layer: f"the output of {layer}" for layer in reached & all_dead}
    return {name: beside[layers[name]] for name in sorted(dead) if layers[name] in beside}


@rule("KB304", "gradients-match-oracle", Level.MUST)
@unless_bare
def gradients_match_oracle(facts: Facts) -> Iterable[Observation]:
    """In a training step, what each block returns, the gradient that leaves it and its adapters' gradients equal those of
    the float64 twin's block on the same inputs and incoming gradients, and what enters a block equals what the twin makes
    of its neighbours' outputs and gradients, all within four yardsticks.

    A yardstick is the distance between the twin in the preparation's own dtypes and the float64 twin, or the median over
    all blocks of a class if the median is larger; what four yardsticks could make zero is left out. The whole batch is
    judged, and its first row without a mask; of a small model also the adapters against a float64 twin of the whole.

    Why: only a comparison with an independent computation shows a gradient that is present, finite and wrong. By the
    chain rule a step is right if its blocks and its joints are. Errors grow with depth: a twin of the whole model does
    not see a gradient that is off by a thousandth in one block of many. So small an error shows in a tensor's scale, the
    least-squares factor between the tensor and that of the twin in the same dtypes: if the signs of n differences are
    independent, rounding moves the factor by their relative size over the root of n, and eight of these are allowed.
    Where most tensors of a class of blocks have the twin's bits, or a watched block ran the same kernels on a CPU, tensors
    differ by at most a quarter of a yardstick.
    Symptom: training that works, and ends worse than the same run elsewhere.
    Fix: look at the block that the failure names: at the layers that KB303 names, then at the operations between them.
    Sources: bitsandbytes#2034, unsloth-zoo#482.
    """
    runs = {
        "": (facts.blockwise, facts.gradients),
        " (one row, no mask)": (facts.single_blockwise, facts.single_gradients),
    }
    judged = 0
    for run, (blockwise, gradients) in runs.items():
        whole = [] if blockwise.moved else gradients_off(gradients)
        tensors = list(tensors_off(blockwise))
        # Of a prompt or a prefix no parameter is inside a block: what leaves the blocks is judged.
        alone = not blockwise.adapters and not whole
        judged += len(tensors) if alone else len(whole) + sum(map(measurable, blockwise.adapters.values()))
        for seen in (*tensors, *whole):
            yield dataclasses.replace(seen, where=f"{seen.where}{run}")
    if not judged:
        raise NotApplicable("rounding alone moves every gradient by as much as it is long")


@rule("KB305", "checkpointing-changes-nothing", Level.MUST)
def checkpointing_changes_nothing(facts: Facts) -> Iterable[Observation]:
    """With checkpointing, loss and gradients equal those of the same model without checkpointing.

    They must be bitwise equal on a CPU if each block's inputs are contiguous and no other module reads them. Otherwise
    gradients are added in another order, and must agree within the yardstick.

    Why: a recompute that differs from the forward gives the gradients of another function.
    Symptom: another loss if checkpointing is on; gradients of the vision tower that are exactly zero.
    Fix: recompute under the same mode, mask, cache setting and random state.
    Sources: transformers#45242, transformers#44158, peft#2826, transformers#24247.
    """
    needs_checkpointing(facts)
    yield _same_loss("loss", facts.plain_run, facts.run, facts)
    yield _same_loss("loss of a later step", facts.run, facts.repeated_run, facts)
    yield from compared(facts.against_plain, exact=exactly(facts))


def _same_loss(where: str, one: RunFacts, other: RunFacts, facts: Facts) -> Observation:
    close = not exactly(facts) and math.isclose(one.loss, other.loss, rel_tol=facts.compute_ulp)
    return Observation(where, repr(one.loss), repr(other.loss), ok=one.loss_bits == other.loss_bits or close)


@rule("KB306", "reentrant-agrees", Level.MUST)
def reentrant_agrees(facts: Facts) -> Iterable[Observation]:
    """Reentrant and non-reentrant checkpointing of the same model give the same gradients.

    Why: users change the mode because DDP or ZeRO-3 needs it; the result must not depend on the mode.
    Symptom: "CheckpointError: Recomputed values have different metadata"; gradients missing in one mode.
    Fix: pass tensors that need gradients positionally, and make inputs require grad.
    Sources: trl#2514, trl#4782, transformers#34928.
    """
    needs_checkpointing(facts)
    if not facts.run.checkpoints:
        raise NotApplicable("no block was checkpointed, so there is no mode to switch")
    raised = facts.other_mode_raised
    if raised:
        step = Observation("training step in the other mode", "no error", str(raised), ok=False).of(raised)
        yield unless_unprepared(step, facts, Party.MODEL, lambda base: not _agrees(base))
        return
    mendable = reentrant(facts) and _is_cut(facts)
    for gradient in compared(facts.against_other_mode, exact=exactly(facts)):
        yield gradient if mendable else unless_unprepared(gradient, facts, Party.MODEL, lambda base: not _agrees(base))


def _is_cut(facts: Facts) -> bool:
    """Whether a tower's inputs do not require grad, which a preparation can mend."""
    try:
        return any(not seen.ok for seen in inputs_require_grad(facts))
    except NotApplicable:
        return False


def _agrees(facts: Facts) -> bool:
    return not facts.other_mode_raised and all(o.ok for o in compared(facts.against_other_mode, exact=exactly(facts)))


@rule("KB307", "dropout-replayed", Level.MUST)
def dropout_replayed(facts: Facts) -> Iterable[Observation]:
    """With a high dropout rate and one seed, runs with and without checkpointing agree: the recompute drops the
    same activations.

    Why: another dropout mask in the recompute gives the gradient of a network that was never run.
    Symptom: noisy, slightly wrong training that happens only with dropout.
    Fix: leave ``preserve_rng_state`` at its default, True.
    Sources: torch.utils.checkpoint documentation; specification KB307.
    """
    needs_checkpointing(facts)
    if not facts.run.checkpoints:
        raise NotApplicable("no block was checkpointed, so nothing is replayed")
    yield from compared(facts.against_plain_dropout, exact=exactly(facts))


@rule("KB308", "survives-interleaving", Level.MUST)
def survives_interleaving(facts: Facts) -> Iterable[Observation]:
    """After any order of evaluation, generation, preparing again, copying, moving, saving, switching modes and training,
    the next training step's gradients are what a fresh model with the same adapters gives, and the packed
    weights and their quantization state are the same.

    Moves are those to the CPU and back, through a state dict, under accelerate's hooks (in which a step is trained) and out of them, into its
    offload to the CPU and to files, and of the base through a checkpoint, which is prepared again: each that libraries let the base
    take. Adapters of PEFT are off in one evaluation. On a machine where a library would do something else in a user's own training, which
    is switched off otherwise, an evaluation and training steps are taken with that on, too.

    Why: training loops evaluate, generate and save between steps. If one of these damages the model, training goes
    on, wrongly.
    Symptom: a loss that jumps after the first evaluation; training that fails after ``generate``.
    Fix: keep no state in hooks or forwards, and change no weight in a forward; keep what unpacks a weight in parameters
    and buffers, which moves take along.
    Sources: specification KB308; bitsandbytes 0.50.2 ``_convert_weight_packed_for_cpu``; bitsandbytes#1775, bitsandbytes#1786,
    bitsandbytes#1897.
    """
    require_turn(facts.conditions, facts.seed, 2, 3)
    for outcome in facts.interleaved:
        party = Party.STACK if outcome.unsteady else Party.MODEL
        step = Observation(
            outcome.step, "runs", str(outcome.raised or "runs"), ok=not outcome.raised, note=outcome.unsteady
        )
        yield unless_unprepared(step.of(outcome.raised), facts, party, partial(_raises, outcome))
        where, changed = f"{outcome.step}: quantized weights", ", ".join(outcome.changed[:4])
        bits = Observation(
            where, "as before anything ran", changed or "the same", ok=not changed, note=outcome.unsteady
        )
        yield unless_unprepared(bits, facts, party, partial(_changes, outcome))
        if outcome.hooks_added:
            yield Observation(f"{outcome.step}: hooks", "none added", f"{outcome.hooks_added} added", ok=False)
        used, fresh = outcome.checkpoints
        if used != fresh:
            yield Observation(f"{outcome.step}: checkpoints", f"{fresh} as when fresh", str(used), ok=False)
        for gradient in compared(outcome.gradients, exact=exactly(facts)):
            placed = dataclasses.replace(gradient, where=f"{outcome.step}: {gradient.where}")
            yield unless_unprepared(placed, facts, party, partial(_differs, outcome.step, gradient.where))


def _differs(step: str, name: str, facts: Facts) -> bool:
    gradients = next((o.gradients for o in facts.interleaved if o.step == step), {})
    own = {key: distance for key, distance in gradients.items() if key == name}
    return any(not gradient.ok for gradient in compared(own, exact=exactly(facts)))


def _changes(outcome: StepOutcome, facts: Facts) -> bool:
    return any(o.step == outcome.step and {*outcome.changed} <= {*o.changed} for o in facts.interleaved)


def _raises(outcome: StepOutcome, facts: Facts) -> bool:
    return any((o.step, o.raised) == (outcome.step, outcome.raised) for o in facts.interleaved)


@rule("KB309", "loss-falls", Level.MUST)
@unless_bare
def loss_falls(facts: Facts) -> Iterable[Observation]:
    """Along an optimizer step the loss changes as the gradient says: by the gradient times the change of the adapters.

    A parabola through the losses on the way of the step has a first-order and a second-order term; a cubic has another
    first-order term, where rounding is in the way or the step is too long. The first-order term is what the gradient
    says, within six times that difference, or within a quarter. The step is chosen so that the difference is small: where
    six times the difference are more than a half at every learning rate, nothing follows; nor from another slope along a step that
    changes the loss by less than an ulp of the dtype that layers compute in or round their inputs to.

    Why: this is the end-to-end check that the prepared model can learn.
    Symptom: a loss that stays, rises, or is NaN or 0.
    Fix: mend the other broken rules first; this one is seldom broken alone.
    Sources: peft#389, trl#618, transformers#26207.
    """
    t = facts.training
    if not any(t.predicted) and all(map(math.isfinite, t.losses)):
        if not any(g.live for g in facts.gradients.values()):
            raise NotApplicable("no adapter of the float64 twin has a gradient on this batch either")
        training = {p.dtype for p in facts.wrapped.parameters.values() if p.adapter and p.requires_grad}
        if training and training <= ULPS.keys():
            raise NotApplicable("what trains is in half precision, which rounds every update away (KB313)")
        yield Observation("gradient", "changes the adapters", "no adapter has one", ok=False)
        return
    bound = slope_bound(t.uncertainty)
    if bound > WIDEST:
        raise NotApplicable(f"the loss is rough: its slope is uncertain by {t.uncertainty:.0%} at every learning rate")
    actual = f"by {t.slope:.2f} times that: from {t.losses[0]:.4f} to {t.losses[-1]:.4f}"
    finite = all(map(math.isfinite, t.losses))
    ok = finite and abs(t.slope - 1) <= bound
    if finite and not ok and abs(t.predicted[-1]) < _coarsest_ulp(facts) * abs(t.losses[0]):
        # Activations that move by less than half an ulp do not move: along such a step the loss is one flat of a staircase.
        raise NotApplicable(
            "the loss is straight along steps alone that are rounded away in the dtype that layers compute in or round inputs to"
        )
    yield Observation("loss", f"changes by {t.predicted[-1]:.2e} in the first order", actual, ok=ok)


def _coarsest_ulp(facts: Facts) -> float:
    """Of what layers compute in, round their inputs to, and get from weights that nothing cast."""
    inputs = [layer.input_ulp for layer in facts.base.layers.values()]
    weights = [ULPS[p.dtype] for p in facts.wrapped.parameters.values() if p.dtype in ULPS and not p.adapter]
    return max([facts.compute_ulp, *inputs, *weights])


def exactly(facts: Facts) -> bool:
    """Whether the stack computes checkpointed and plain runs to the same bits: on a CPU, unless a block is inexact."""
    on_cpu = all(p.device == "cpu" for p in facts.base.parameters.values())
    return on_cpu and not facts.plain_run.inexact


def compared(distances: Mapping[str, Distance], *, exact: bool) -> Iterable[Observation]:
    """One observation for each gradient against its counterpart."""
    for name, d in distances.items():
        ok = d.equal if exact else (d.equal or d.relative <= d.bound)
        expected = "the same bits" if exact else f"within {d.bound:.2e}"
        yield Observation(name, expected, "the same" if d.equal else f"off by {d.relative:.2e}", ok=ok)
