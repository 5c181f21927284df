"""A failure is the implementation's unless the unprepared base shows it too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.result import Observation, Party
from kbitcheck.judge.attribution import blame, unless_bare

OWN = (Party.IMPLEMENTATION, "")


class Unasked:
    @property
    def unprepared(self) -> Any:
        raise AssertionError("the base costs a run, and nothing failed")


def test_the_base_is_not_asked_where_nothing_failed() -> None:
    assert blame(Unasked(), True, Party.STACK, lambda bare: True) == OWN  # type: ignore[arg-type]


def test_what_the_base_does_too_is_the_partys_and_names_its_witness() -> None:
    facts: Any = SimpleNamespace(unprepared=SimpleNamespace(raised="it broke"))
    party, witness = blame(facts, False, Party.MODEL, lambda bare: bare.raised == "it broke")  # type: ignore[attr-defined]
    assert party is Party.MODEL
    assert "unprepared base" in witness
    assert blame(facts, False, Party.MODEL, lambda bare: bare.raised == "otherwise") == OWN  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error", [NotApplicable("no cache"), Unavailable("no step"), Unavailable("it raised", failed=True)]
)
def test_a_base_that_cannot_be_asked_excuses_nothing(error: Exception) -> None:
    def alike(bare: Any) -> bool:
        raise error

    facts: Any = SimpleNamespace(unprepared=None)
    assert blame(facts, False, Party.STACK, alike) == OWN


def judge(facts: Any) -> Any:
    """A rule."""
    if facts.broken is None:
        raise NotApplicable("nothing to judge")
    for where in ("here", "there"):
        yield Observation(where, where not in facts.broken, "whole", "broken")


@pytest.mark.parametrize(
    ("bare", "whose"),
    [
        (("here",), [Party.MODEL, Party.IMPLEMENTATION]),
        ((), [Party.IMPLEMENTATION, Party.IMPLEMENTATION]),
        (None, [Party.IMPLEMENTATION, Party.IMPLEMENTATION]),  # it cannot be judged
    ],
)
def test_only_what_the_bare_base_fails_in_the_same_place_is_the_models(bare: Any, whose: list[Party]) -> None:
    facts: Any = SimpleNamespace(broken=("here", "there"), bare=SimpleNamespace(broken=bare))
    found = list(unless_bare(judge)(facts))
    assert [(o.where, o.ok) for o in found] == [("here", False), ("there", False)]
    assert [o.party for o in found] == whose


def test_the_bare_base_is_not_asked_where_nothing_failed() -> None:
    class Whole:
        broken = ()

        @property
        def bare(self) -> Any:
            raise AssertionError("the base costs a run, and nothing failed")

    assert all(o.ok for o in unless_bare(judge)(Whole()))  # type: ignore[arg-type]
    assert unless_bare(judge).__doc__ == "A rule."
