"""KB310 to KB312: what is right under the conditions that everybody looks at is right under those that are drawn."""

import dataclasses
from collections.abc import Iterable
from functools import partial

from kbitcheck.core.conditions import LATER, TURNS, require_turn
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import unless_bare, unless_unprepared
from kbitcheck.judge.blockwise import measurable, tensors_off
from kbitcheck.judge.gradients import compared, exactly, needs_checkpointing


@rule("KB310", "any-real-batch", Level.MUST)
@unless_bare
def any_real_batch(facts: Facts) -> Iterable[Observation]:
    """Block by block, outputs and gradients equal the float64 twin's on a batch that is drawn for the case: three to five rows of
    more than 64 tokens, an odd number or a multiple of 64, or one row of more than 512, padded on either side or not, with and without
    ignored labels, with adapters that have moved, of a rank from 1 to 64, on all layers, those of attention or some others,
    in a form of the call that scripts use: embeddings in place of ids, position ids, other masks, a tuple, no labels, and so on.
    With checkpointing its gradients are the same, of as many checkpoints as ever.

    Why: what is right for one batch may be wrong for every other: a condition on the number of rows, on the length, or
    on the side of the padding.
    Symptom: training that works on the examples of a test and not on yours.
    Fix: look at what depends on the shape of the input.
    Sources: specification KB310.
    """
    require_turn(facts.conditions, facts.seed, 0, TURNS)
    drawn = facts.drawn
    if not any(map(measurable, drawn.blockwise.adapters.values())):
        raise NotApplicable("rounding alone moves every gradient by as much as it is long")
    for seen in tensors_off(drawn.blockwise):
        yield dataclasses.replace(seen, where=f"{seen.where} ({drawn.conditions})")
    for seen in compared(drawn.against_plain, exact=False):
        where = f"{seen.where}, checkpointed ({drawn.conditions})"
        other = dataclasses.replace(seen, where=where)
        yield unless_unprepared(other, facts, Party.STACK, partial(_off_when_checkpointed, seen.where))
    if drawn.checkpoints is not None:
        where, usual = f"checkpoints ({drawn.conditions})", drawn.usual_checkpoints
        ok = drawn.checkpoints == usual
        yield Observation(where, f"{usual} checkpoints", f"{drawn.checkpoints} checkpoints", ok=ok)


def _off_when_checkpointed(name: str, base: Facts) -> bool:
    return any(seen.where == name and not seen.ok for seen in compared(base.drawn.against_plain, exact=False))


@rule("KB311", "still-right-later", Level.MUST)
def still_right_later(facts: Facts) -> Iterable[Observation]:
    """After many optimizer steps, with evaluations at drawn places among them and hours by the clock, a step gives the gradients that the
    first step gave, of as many checkpoints, once the adapters are put back to what they were.

    Why: a counter, a cache or a hook that acts in a later step is not seen in the first.
    Symptom: a run that is right at first, and worse than the same run elsewhere after a while.
    Fix: keep no state between steps.
    Sources: specification KB311.
    """
    require_turn(facts.conditions, facts.seed, LATER, TURNS)
    later = facts.later
    first, *others = later.checkpoints.items()
    for place, number in others:
        where = f"checkpoints (after {place})"
        yield Observation(where, f"{first[1]} checkpoints", f"{number} checkpoints", ok=number == first[1])
    for look, distances in later.looks.items():
        for seen in compared(distances, exact=exactly(facts)):
            where = f"{seen.where} (after {look})"
            late = dataclasses.replace(seen, where=where)
            yield unless_unprepared(late, facts, Party.MODEL, lambda base: not all_equal(base))


@rule("KB312", "routing-stable", Level.SHOULD)
def routing_stable(facts: Facts) -> Iterable[Observation]:
    """In a checkpointed step the experts that a router picks in the recompute are those of the forward. Tokens whose picks hang on
    one ulp of the scores are counted.

    Why: a gradient of experts that the forward did not run is a gradient of another function.
    Symptom: with non-reentrant checkpointing "a different number of tensors was saved"; with reentrant nothing but a worse model.
    Fix: give routers no noise that the recompute does not repeat, and no dtype that the recompute does not have.
    Sources: specification KB312.
    """
    needs_checkpointing(facts)
    if not facts.run.routers:
        raise NotApplicable("no router ran twice in a checkpointed step")
    for name, router in facts.run.routers.items():
        ties = f"{router.near_ties} of {router.tokens} tokens within one ulp of other experts"
        changed = f"{router.changed} of {router.tokens} tokens have others"
        note = f"{name}: {ties}" if router.near_ties else ""
        yield Observation(name, "the experts of the forward", changed, ok=not router.changed, note=note)


def all_equal(facts: Facts) -> bool:
    """Whether every later step gives the bits of the first."""
    return all(d.equal for distances in facts.later.looks.values() for d in distances.values())
