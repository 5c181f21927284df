"""Whose a failure is: not the implementation's, where the same base shows it unprepared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Observation, Party
from kbitcheck.core.rule import Check


def blame(facts: Facts, ok: bool, party: Party, alike: Callable[[Facts], bool]) -> tuple[Party, str]:
    """The party, with its witness, of an observation that is not ``ok``: ``party`` where ``alike`` holds of the base.

    The base is asked only then: unprepared, frozen, with the same adapters, and checkpointed by transformers itself.
    """
    if ok:
        return Party.IMPLEMENTATION, ""
    try:
        same = alike(facts.unprepared)
    except (NotApplicable, Unavailable):
        same = False
    return (party, "the unprepared base, checkpointed by transformers itself, does the same") if same else (
        Party.IMPLEMENTATION, ""
    )  # fmt: skip


BARE = "the same base, cast as the profile promises and otherwise left alone, fails the same"


def unless_bare(judge: Check) -> Check:
    """The rule, with those of its failures named the model's that the bare base shows too, in the same places.

    Bare is a base that nothing prepares or checkpoints; the harness itself casts what the profile promises. It is asked
    only where something failed. What is broken there is broken by quantization or rounding, whoever prepares.
    """

    @functools.wraps(judge)
    def judged(facts: Facts) -> Iterable[Observation]:
        broken: frozenset[str] | None = None
        for seen in judge(facts):
            if seen.ok or seen.party is not Party.IMPLEMENTATION:
                yield seen
                continue
            broken = _broken(judge, facts) if broken is None else broken
            alike = seen.where in broken
            yield dataclasses.replace(seen, party=Party.MODEL, witness=BARE) if alike else seen

    return judged


def _broken(judge: Check, facts: Facts) -> frozenset[str]:
    try:
        return frozenset(seen.where for seen in judge(facts.bare) if not seen.ok)
    except (NotApplicable, Unavailable):
        return frozenset()
