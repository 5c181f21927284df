"""A recorded step is watched as a plain one is, and stands for it where its bits are those of the checkpointed one."""

from __future__ import annotations

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import switches
from kbitcheck.run.subject import load
from tests.shallow import shallow


@pytest.mark.parametrize(
    ("model", "inexact", "stands"),
    [("tiny:llama", False, True), ("tiny:t5", True, False)],  # every decoder block of T5 reads what the encoder returns
)
def test_a_recorded_step_has_the_facts_of_a_plain_one(model: str, inexact: bool, stands: bool) -> None:
    spec = CaseSpec(model=model, quant="nf4", implementation="reference", checkpointing="non-reentrant")
    stepped = Case(spec, load("reference").function, Loaded.from_source(shallow(model), spec))._stepped
    (recorded, _), _ = stepped._recorded
    attached = stepped._wrapped.attached
    with switches.checkpointing_off(attached.model):
        plain = stepped._preparation.step(attached, watch=True)
    assert recorded.facts == plain.facts
    assert bool(plain.facts.inexact) is inexact
    assert (stepped._plain is recorded) is stands
