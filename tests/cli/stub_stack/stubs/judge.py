"""Rules with known outcomes; KB103 is the one that calls the subject."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kbitcheck
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule

__path__ = [str(Path(kbitcheck.__file__).parent / "judge")]  # where findings.toml lies


@rule("KB101", "always-kept", Level.MUST)
def always_kept(facts: Any) -> Iterator[Observation]:
    """The sun rises."""
    yield Observation("sun", "up", "up", ok=True)


@rule("KB102", "not-applicable", Level.MUST)
def not_applicable(facts: Any) -> Iterator[Observation]:
    """Nothing here can be examined."""
    if facts:
        raise NotApplicable("there is nothing")
    yield Observation("nothing", "", "", ok=True)


@rule("KB103", "returns", Level.MUST)
def returns(facts: Any) -> Iterator[Observation]:
    """The function returns the model.

    Symptom: None where a model was.
    Fix: return it.
    """
    found = facts.returned
    yield Observation("prepare", "the model", repr(found), ok=found is not None)


@rule("KB201", "says-please", Level.SHOULD)
def says_please(facts: Any) -> Iterator[Observation]:
    """The function says please."""
    yield Observation("prepare.please", "please", "nothing", ok=hasattr(facts.function, "please"))


@rule("KB901", "stack-works", Level.MUST)
def stack_works(facts: Any) -> Iterator[Observation]:
    """int8 works on the stack."""
    for layer in range(12):
        yield Observation(
            f"model.layers.{layer}.mlp",
            "works",
            "does not",
            ok="int8" not in facts.spec.quant,
            party=Party.STACK,
            witness="a bare layer",
        )
