"""What each profile promises, and that nothing else knows a profile by name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import kbitcheck
from kbitcheck.core.cases import Profile
from kbitcheck.core.profile import PROMISES


@pytest.mark.parametrize(
    ("profile", "norm", "other", "autocast"),
    [("peft", True, True, False), ("qlora", True, False, True), ("frozen-half", False, False, False)],
)
def test_what_is_cast_and_how_training_runs(profile: str, norm: bool, other: bool, autocast: bool) -> None:
    promise = PROMISES[profile]
    assert (promise.casts(norm=True), promise.casts(norm=False), promise.autocast) == (norm, other, autocast)


def test_every_profile_of_a_case_has_a_promise() -> None:
    assert set(get_args(Profile)) - {"auto"} == set(PROMISES)


@pytest.mark.parametrize("layer", ["judge", "observe"])
def test_no_rule_and_no_fact_compares_the_name_of_a_profile(layer: str) -> None:
    sources = (Path(kbitcheck.__file__).parent / layer).rglob("*.py")
    names = [f'"{name}"' for name in PROMISES if name != "peft"]
    assert [s.name for s in sources if any(name in s.read_text(encoding="utf-8") for name in names)] == []
