"""Whose a failure is, on architectures that fail for a reason of their own, and on one that only preparation fails."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.observe.case import open_case
from kbitcheck.run import subject as implementations

MODEL, IMPLEMENTATION = Party.MODEL, Party.IMPLEMENTATION


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
    spec = CaseSpec(model=name, quant="nf4", implementation=prepare, checkpointing="default")
    case = open_case(spec, implementations.load(prepare))
    result = judge(rules()[code], case)
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
        ("arch:seq2seq-lm/vibevoice_asr", "KB510"),  # it draws noise in every forward
    ],
)
def test_the_reference_keeps_what_can_be_kept(name: str, code: str) -> None:
    spec = CaseSpec(model=name, quant="nf4", implementation="reference", checkpointing="reentrant")
    result = judge(rules()[code], open_case(spec, implementations.load("reference")))
    assert result.status is Status.PASS, (result.reason, result.failures[:2])


@pytest.mark.transformers5("findings of this transformers")
@pytest.mark.parametrize(("code", "status"), [("KB302", Status.PASS), ("KB305", Status.PASS), ("KB309", Status.SKIP)])
def test_no_bound_follows_from_a_twin_that_is_not_finite(code: str, status: Status) -> None:
    """Under a mask this model's own code makes NaN of float64."""
    spec = CaseSpec(
        model="arch:seq2seq-lm/prophetnet", quant="nf4", implementation="reference", checkpointing="reentrant"
    )
    assert judge(rules()[code], open_case(spec, implementations.load("reference"))).status is status
