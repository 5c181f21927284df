"""Which party a failure is attributed to: not the implementation, where the same base shows the failure unprepared."""

import functools
from collections.abc import Callable, Iterable, Mapping

from kbitcheck.core.errors import NotApplicable, Unavailable, is_own, short_of
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Observation, Party
from kbitcheck.core.rule import Check

RECAST = "bitsandbytes recasts a quantized layer's bias to the compute dtype in its forward"
REPACKED = (
    "the same codes as bitsandbytes repacks them in a forward in eval mode on this processor, with rounded scales, which a save after that"
    " leaves in another order (docs/findings/cpu_eval_repacks.py, cpu_eval_then_save.py)"
)
UNPREPARED = "the unprepared base, checkpointed by transformers itself, does the same"


def unless_unprepared(
    observation: Observation, facts: Facts, party: Party, shows: Callable[[Facts], bool]
) -> Observation:
    """The observation, attributed to ``party`` if it is not ok and the unprepared base ``shows`` the same.

    That base is frozen, has the same adapters, and transformers itself checkpoints it. It is run only for a failure.
    """
    if observation.ok:
        return observation
    same, witness = _shows(shows, lambda: facts.unprepared), UNPREPARED
    if same is None:  # some adapters, as IA3's, run where the base is in float32 alone
        same, witness = _shows(shows, lambda: facts.bare), BARE
    return observation.attributed(party, witness) if same else observation


def _shows(shows: Callable[[Facts], bool], base: Callable[[], Facts]) -> bool | None:
    """Whether a base shows a failure; None where it does not run with these adapters."""
    try:
        return shows(base())
    except (NotApplicable, Unavailable):
        return False
    except RuntimeError as error:
        if short_of(error) or is_own(error):
            raise
        return None


BARE = "the same base, cast as the profile promises and otherwise left alone, fails the same"
OUTPUT = "the same base, cast as the profile promises and otherwise left alone, has another output of this block than its twin"


def unless_bare(judge: Check) -> Check:
    """The rule, with a failure attributed to the model if the bare base fails in the same place.

    Nothing prepares or checkpoints the bare base; kbitcheck itself casts what the profile promises. The base is judged
    only after a failure. What fails there fails by quantization or rounding, whatever prepares the model. A tensor that it does
    not have, as the gradient that leaves its first block, is judged by the output of that block.
    """

    @functools.wraps(judge)
    def judged(facts: Facts) -> Iterable[Observation]:
        bare: Mapping[str, bool] | None = None
        for observation in judge(facts):
            if observation.ok or observation.party is not Party.IMPLEMENTATION:
                yield observation
                continue
            bare = _judged_bare(judge, facts) if bare is None else bare
            witness = _witness(observation.where, bare)
            yield observation.attributed(Party.MODEL, witness) if witness else observation

    return judged


def _judged_bare(judge: Check, facts: Facts) -> Mapping[str, bool]:
    """Whether the bare base is as expected, by place."""
    bare: dict[str, bool] = {}
    try:
        for observation in judge(facts.bare):
            bare[observation.where] = observation.ok and bare.get(observation.where, True)
    except (NotApplicable, Unavailable):
        return {}
    return bare


def _witness(where: str, bare: Mapping[str, bool]) -> str:
    """What the bare base shows of a failure in this place; "" if nothing."""
    if where in bare:
        return "" if bare[where] else BARE
    block, inside, _ = where.partition(": ")
    outputs = [ok for place, ok in bare.items() if place.startswith(f"{block}: output")]
    return OUTPUT if inside and not all(outputs) else ""
