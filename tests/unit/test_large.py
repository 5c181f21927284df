"""A large model, whose copies come one at a time and whose weights are unpacked anew, is judged as a small one."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from kbitcheck.core import machine
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.rule import judge, select
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import layers
from kbitcheck.observe.twin import twins as twin
from kbitcheck.run.subject import load
from tests.few_steps import EACH_HALF, MANY_STEPS
from tests.shallow import shallow


@EACH_HALF
@pytest.mark.parametrize(("model", "quant"), [("tiny:llama", "nf4,double"), ("tiny:gpt2", "int8")])
def test_it_is_judged_the_same(model: str, quant: str, codes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases in quantized layers (gpt2) and without."""
    spec = CaseSpec(model=model, quant=quant, implementation="reference", checkpointing="reentrant", cut="never")

    def judged() -> tuple[dict[str, str], int]:
        base = Loaded.from_source(shallow(model), spec)
        case = Case(spec, load("reference").function, base)
        copied = Mock(side_effect=base.copy)
        monkeypatch.setattr(base, "copy", copied)
        return {rule.code: judge(rule, case).status.value for rule in select(codes)}, copied.call_count

    small, copies = judged()
    for module, limit in ((machine, "LARGE_BYTES"), (layers, "KEPT_BYTES"), (twin, "LARGE_BYTES")):
        monkeypatch.setattr(module, limit, 0)
    large, more = judged()
    assert large == small
    assert "ERROR" not in large.values()
    if codes != MANY_STEPS:  # which share nothing
        assert more > copies  # the object that steps share was made anew
