"""Whose it is that two modes of checkpointing give different gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core.facts import Distance
from kbitcheck.core.result import Party
from kbitcheck.judge.gradients import reentrant_agrees

SAME = {"lora_A": Distance(equal=True, relative=0.0, yardstick=0.0)}
CUT = {"lora_A": Distance(equal=False, relative=math.inf, yardstick=0.0)}


def case(plain: Any, other: Any, bare: Any = None) -> Any:
    return SimpleNamespace(
        checkpointing="default",
        run=SimpleNamespace(checkpoints=({"use_reentrant": "False"},)),
        plain_run=SimpleNamespace(inexact=()),
        base=SimpleNamespace(parameters={}, supports_checkpointing=True),
        other_mode_raised=None,
        against_plain=plain,
        against_other_mode=other,
        unprepared=bare,
    )


@pytest.mark.parametrize(
    ("plain", "base", "party"),
    [
        (SAME, CUT, Party.MODEL),  # the base bears the other mode no better
        (SAME, SAME, Party.IMPLEMENTATION),  # the base bears both
        (CUT, CUT, Party.MODEL),  # that its own mode is wrong is KB305's to tell
    ],
)
def test_the_other_mode_is_the_models_where_the_base_fails_too(
    monkeypatch: pytest.MonkeyPatch, plain: Any, base: Any, party: Party
) -> None:
    monkeypatch.setattr("kbitcheck.judge.gradients.needs_checkpointing", lambda facts: None)
    (told,) = reentrant_agrees(case(plain, CUT, case(SAME, base)))
    assert not told.ok
    assert told.party is party
