"""A failure is the implementation's unless the unprepared base shows it too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.result import Observation, Party
from kbitcheck.judge.attribution import unless_bare, unless_unprepared

GOOD = Observation("here", "whole", "whole", ok=True)
BROKEN = Observation("here", "whole", "broken", ok=False)


class Unexamined:
    @property
    def unprepared(self) -> Any:
        raise AssertionError("the base costs a run, and nothing failed")


def test_the_base_is_not_run_where_nothing_failed() -> None:
    facts: Any = Unexamined()
    assert unless_unprepared(GOOD, facts, Party.STACK, lambda base: True) is GOOD


def test_a_failure_that_the_base_shows_too_is_attributed_with_its_witness() -> None:
    facts: Any = SimpleNamespace(unprepared=SimpleNamespace(raised="it broke"))
    shown = unless_unprepared(BROKEN, facts, Party.MODEL, lambda base: base.raised == "it broke")  # type: ignore[attr-defined]
    assert shown.party is Party.MODEL
    assert "unprepared base" in shown.witness
    assert unless_unprepared(BROKEN, facts, Party.MODEL, lambda base: base.raised == "otherwise") is BROKEN  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error", [NotApplicable("no cache"), Unavailable("no step"), Unavailable("it raised", failed=True)]
)
def test_a_base_that_cannot_be_run_excuses_nothing(error: Exception) -> None:
    def shows(base: Any) -> bool:
        raise error

    facts: Any = SimpleNamespace(unprepared=None)
    assert unless_unprepared(BROKEN, facts, Party.STACK, shows) is BROKEN


def judge(facts: Any) -> Any:
    """A rule."""
    if facts.broken is None:
        raise NotApplicable("nothing to judge")
    for where in ("here", "there"):
        yield Observation(where, "whole", "broken", ok=where not in facts.broken)


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


@pytest.mark.parametrize(
    ("bare", "whose"),
    [
        ({"block: output": False}, Party.MODEL),
        ({"block: output 1 (one row)": False}, Party.MODEL),
        ({"block: output": True}, Party.IMPLEMENTATION),
        ({"other: output": False}, Party.IMPLEMENTATION),
        ({"block: output": False, "block: gradient that leaves x": True}, Party.IMPLEMENTATION),
        ({}, Party.IMPLEMENTATION),
    ],
)
def test_a_tensor_that_the_bare_base_lacks_is_judged_by_its_blocks_output(bare: dict[str, bool], whose: Party) -> None:
    def places(facts: Any) -> Any:
        for where, ok in facts.places.items():
            yield Observation(where, "whole", "broken", ok=ok)

    facts: Any = SimpleNamespace(places={"block: gradient that leaves x": False}, bare=SimpleNamespace(places=bare))
    (found,) = unless_bare(places)(facts)
    assert found.party is whose


def test_the_bare_base_is_not_asked_where_nothing_failed() -> None:
    class Whole:
        broken = ()

        @property
        def bare(self) -> Any:
            raise AssertionError("the base costs a run, and nothing failed")

    assert all(o.ok for o in unless_bare(judge)(Whole()))  # type: ignore[arg-type]
    assert unless_bare(judge).__doc__ == "A rule."
