"""The rules that need few steps of a model: an audit by them takes half as long as one by all rules."""

from __future__ import annotations

import pytest

from kbitcheck.core.rule import select

# Steps in any order, a batch of any shape, and steps again and again.
MANY_STEPS = ("KB308", "KB310", "KB311")


def of_few_steps() -> tuple[str, ...]:
    """Codes of all rules about a model but these."""
    return tuple(rule.code for rule in select() if rule.code not in MANY_STEPS)


# A test by all rules, whose dearest half is slow.
EACH_HALF = pytest.mark.parametrize(
    "codes",
    [
        pytest.param(of_few_steps(), id="few-steps"),
        pytest.param(MANY_STEPS, id="many-steps", marks=pytest.mark.slow),
    ],
)
