"""A failure is the implementation's unless the unprepared base shows it too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core import NotApplicable, Party
from kbitcheck.facts import Unavailable
from kbitcheck.rules.witness import blame

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


@pytest.mark.parametrize("error", [NotApplicable("no cache"), Unavailable("no step")])
def test_a_base_that_cannot_be_asked_excuses_nothing(error: Exception) -> None:
    def alike(bare: Any) -> bool:
        raise error

    facts: Any = SimpleNamespace(unprepared=None)
    assert blame(facts, False, Party.STACK, alike) == OWN
