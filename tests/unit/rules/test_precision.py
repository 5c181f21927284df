"""Whose it is that logits are far from the float twin's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core import Party
from kbitcheck.facts import FunctionFacts
from kbitcheck.rules.precision import same_function

HALF_ULP = 2.0**-7


def measured(error: float, base: float, yardstick: float) -> FunctionFacts:
    return FunctionFacts(base_error=base, error=error, twin_error=yardstick, ulp=1e-7, left_out=0, tokens=48)


@pytest.mark.parametrize(
    ("error", "base", "party"),
    [
        (0.02, 0.02, Party.IMPLEMENTATION),  # still as rough as half precision: nothing was upcast
        (0.55, 0.55, Party.STACK),  # so is the base, which half precision does not explain
        (0.9, 0.55, Party.IMPLEMENTATION),  # further than the base
    ],
)
def test_only_a_base_that_its_dtypes_do_not_explain_excuses(error: float, base: float, party: Party) -> None:
    facts: Any = SimpleNamespace(
        profile="peft",
        base=SimpleNamespace(layers={}),
        forwards=(),
        half_ulp=HALF_ULP,
        function=measured(error, base, 0.001),
        function_as_loaded=measured(base, base, 0.01),
    )
    (told,) = same_function(facts)
    assert not told.ok
    assert told.party is party
