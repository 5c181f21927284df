"""Which party a failure is attributed to: not the implementation, where the same base shows the failure unprepared."""

import functools
from collections.abc import Callable, Iterable

from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Observation, Party
from kbitcheck.core.rule import Check

RECAST = "bitsandbytes recasts a quantized layer's bias to the compute dtype in its forward"
REPACKED = (
    "the same codes in the layout that bitsandbytes repacks to, with rounded scales, in a forward in eval mode on this processor "
    "(docs/findings/cpu_eval_repacks.py)"
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
    try:
        same = shows(facts.unprepared)
    except (NotApplicable, Unavailable):
        same = False
    return observation.attributed(party, UNPREPARED) if same else observation


BARE = "the same base, cast as the profile promises and otherwise left alone, fails the same"


def unless_bare(judge: Check) -> Check:
    """The rule, with a failure attributed to the model if the bare base fails in the same place.

    Nothing prepares or checkpoints the bare base; kbitcheck itself casts what the profile promises. The base is judged
    only after a failure. What fails there fails by quantization or rounding, whatever prepares the model.
    """

    @functools.wraps(judge)
    def judged(facts: Facts) -> Iterable[Observation]:
        failures: frozenset[str] | None = None
        for observation in judge(facts):
            if observation.ok or observation.party is not Party.IMPLEMENTATION:
                yield observation
                continue
            failures = _bare_failures(judge, facts) if failures is None else failures
            same = observation.where in failures
            yield observation.attributed(Party.MODEL, BARE) if same else observation

    return judged


def _bare_failures(judge: Check, facts: Facts) -> frozenset[str]:
    """Where the bare base fails."""
    try:
        return frozenset(observation.where for observation in judge(facts.bare) if not observation.ok)
    except (NotApplicable, Unavailable):
        return frozenset()
