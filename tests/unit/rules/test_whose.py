"""Whose a failure is, on architectures that fail for a reason of their own, and on one that only preparation fails."""

from __future__ import annotations

import os
from functools import cache

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from kbitcheck.core.cases import CaseSpec, Checkpointing
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.observe.open_case import open_case
from kbitcheck.run import subject as implementations

pytestmark = pytest.mark.xdist_group("whose")  # several are of one case
MODEL, IMPLEMENTATION = Party.MODEL, Party.IMPLEMENTATION


@cache
def opened(name: str, prepare: str, checkpointing: Checkpointing) -> OpenCase:
    """One case, of which several rules are judged."""
    spec = CaseSpec(model=name, quant="nf4", implementation=prepare, checkpointing=checkpointing)
    return open_case(spec, implementations.load(prepare))


@pytest.mark.transformers5("findings of this transformers")
@pytest.mark.parametrize(
    ("name", "prepare", "code", "whose"),
    [
        # Its mask is filled with float32's smallest number, which autocast's bfloat16 cannot hold.
        ("arch:masked-lm/deberta-v2", "peft", "KB210", MODEL),
        # Its experts cast what they read to the dtype of the packed weight, which is an integer's.
        ("arch:seq2seq-lm/switch_transformers", "peft", "KB302", MODEL),
        ("arch:seq2seq-lm/switch_transformers", "reference", "KB209", MODEL),
        # Its encoder reads audio, and nothing makes them require grad.
        ("arch:speech-seq2seq/pop2piano", "peft", "KB302", IMPLEMENTATION),
        ("arch:speech-seq2seq/pop2piano", "peft", "KB306", IMPLEMENTATION),
    ],
)
def test_a_failure_is_theirs_who_can_mend_it(name: str, prepare: str, code: str, whose: Party) -> None:
    pytest.importorskip("peft")
    result = judge(rules()[code], opened(name, prepare, "default"))
    assert result.status is Status.FAIL
    assert {f.party for f in result.failures} == {whose}
    assert all(f.witness for f in result.failures) == (whose is MODEL)


@pytest.mark.transformers5("findings of this transformers")
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("arch:speech-seq2seq/pop2piano", "KB302"),
        ("arch:sequence-classification/lilt", "KB305"),  # its last block's layout is read by nothing: zero or missing
        ("arch:masked-lm/yoso", "KB303"),  # its backward bears no autocast, in float32 either
        # It draws noise in every forward, which test_inputs.py sees switched off.
        pytest.param("arch:seq2seq-lm/vibevoice_asr", "KB510", marks=pytest.mark.slow),
    ],
)
def test_the_reference_keeps_what_can_be_kept(name: str, code: str) -> None:
    result = judge(rules()[code], opened(name, "reference", "reentrant"))
    assert result.status is Status.PASS, (result.reason, result.failures[:2])


@pytest.mark.transformers5("findings of this transformers")
@pytest.mark.parametrize(("code", "status"), [("KB302", Status.PASS), ("KB305", Status.PASS), ("KB309", Status.PASS)])
def test_no_bound_follows_from_a_twin_that_is_not_finite(code: str, status: Status) -> None:
    """Under a mask this model's own code makes NaN of float64."""
    case = opened("arch:seq2seq-lm/prophetnet", "reference", "reentrant")
    assert judge(rules()[code], case).status is status
