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
    yield Observation("sun", True, "up", "up")


@rule("KB102", "not-applicable", Level.MUST)
def not_applicable(facts: Any) -> Iterator[Observation]:
    """Nothing here can be examined."""
    if facts:
        raise NotApplicable("there is nothing")
    yield Observation("nothing", True, "", "")


@rule("KB103", "returns", Level.MUST)
def returns(facts: Any) -> Iterator[Observation]:
    """The function returns the model.

    Symptom: None where a model was.
    Fix: return it.
    """
    found = facts.returned
    yield Observation("prepare", found is not None, "the model", repr(found))


@rule("KB201", "says-please", Level.SHOULD)
def says_please(facts: Any) -> Iterator[Observation]:
    """The function says please."""
    yield Observation("prepare.please", hasattr(facts.function, "please"), "please", "nothing")


@rule("KB901", "stack-works", Level.MUST)
def stack_works(facts: Any) -> Iterator[Observation]:
    """int8 works on the stack."""
    for layer in range(12):
        yield Observation(
            f"model.layers.{layer}.mlp",
            "int8" not in facts.spec.quant,
            "works",
            "does not",
            Party.STACK,
            "a bare layer",
        )
