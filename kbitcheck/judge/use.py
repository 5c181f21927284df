"""KB213, KB514 and KB515: other processes, other models in them, and what users do with a prepared model later on."""

from collections.abc import Iterable, Iterator, Mapping

from kbitcheck.core.conditions import PROCESSES, require_processes
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, UseFacts
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule

NOT_DEALT = "of an implementation: `kbitcheck impl` judges it"


@rule("KB515", "still-a-module", Level.MUST)
def still_a_module(facts: Facts) -> Iterable[Observation]:
    """What users do with the model later on gives what it gives with the unprepared base in the same dtypes: thawing a head, an
    embedding or norms; ``modules_to_save``; resized embeddings; autocast; a scaler that overflows; clearing, clipping and
    accumulating gradients; a second backward; every optimizer; evaluation and generation with adapters; merging, saving and
    loading; every keyword of the forward and other forms of its call; a step in another thread, in a forked process, under a launcher's
    variables, after a save or a copy, or of adapters that start at zero, that have magnitudes or another dtype; tiny losses and gradients,
    and NaN; a model that was loaded in another dtype, or frozen, run or checkpointed before; what libraries read of it; and which parameters
    share a storage. Each case of the quick suite tries some of them, which ``--seed`` chooses, and each case of ``--suite full`` all.

    Why: a hook or a wrapper that is right for the one step that is looked at may be wrong for the next thing that is done.
    Symptom: a head that does not train; a loss scale that never falls; adapters without effect in evaluation.
    Fix: change flags, dtypes and checkpointing, and leave the module's methods, gradients and outputs alone.
    Sources: specification KB515; unsloth#3327, unsloth#2343, peft#602.
    """
    if facts.conditions in ("", PROCESSES):
        raise NotApplicable(NOT_DEALT)
    for seen in facts.uses:
        where = f"{seen.use}: {seen.what}" if seen.what else seen.use
        yield Observation.either(where, seen.expected, _actual(seen), ok=_as_the_base(seen, facts))


def _as_the_base(seen: UseFacts, facts: Facts) -> bool:
    """Equal, or no further from it than four times its own distance from the same in float32, or than rounding alone."""
    if seen.same:
        return True
    return seen.distance is not None and seen.distance.relative <= 4 * max(seen.distance.yardstick, facts.compute_ulp)


def _actual(seen: UseFacts) -> str:
    return seen.actual if seen.distance is None else f"{seen.actual}, off by {seen.distance.relative:.2e}"


@rule("KB213", "shared-across-models", Level.MUST)
def shared_across_models(facts: Facts) -> Iterable[Observation]:
    """A model is prepared, and trains, as in a fresh process where another one, of another class, was prepared before it; and
    preparing and training the second does not change the first. ``--suite full`` looks at this, once for
    each base.

    Why: what a preparation remembers of one model, in a module or a class, it may apply to the next.
    Symptom: a second model of a process that is prepared otherwise, such as a teacher beside its student.
    Fix: keep nothing outside the model.
    Sources: specification KB213.
    """
    require_processes(facts.conditions)
    seen = facts.unwatched
    yield from _equal("prepared second", seen.second, seen.alone)
    yield from _equal("another model, prepared second", seen.other_second, seen.other)
    yield from _equal("the first, after a second was prepared", seen.kept_after, seen.kept)


@rule("KB514", "same-when-unwatched", Level.MUST)
def same_when_unwatched(facts: Facts) -> Iterable[Observation]:
    """In a process where no module, argument, environment variable, stack frame, thread, open file or parent names kbitcheck, the same
    calls give the same bits: the prepared model, and losses, gradients and logits of a few steps. ``--suite full`` looks at this,
    once for each base.

    Why: an implementation that does otherwise when it is watched is not the one that users run.
    Symptom: a check that passes, and a training run that is wrong.
    Fix: depend on the arguments alone.
    Sources: specification KB514.
    """
    require_processes(facts.conditions)
    yield from _equal("unwatched", facts.unwatched.alone, facts.unwatched.here)


def _equal(where: str, actual: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[Observation]:
    for name in {**expected, **actual}:
        one, other = expected.get(name, "absent"), actual.get(name, "absent")
        yield Observation(f"{where}: {name}", one, other, ok=one == other)
