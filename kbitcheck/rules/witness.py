"""Whose a failure is: not the implementation's, where the same base shows it unprepared."""

from __future__ import annotations

from collections.abc import Callable

from kbitcheck.core import NotApplicable, Party
from kbitcheck.facts import Facts, Unavailable


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
