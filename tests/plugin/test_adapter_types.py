"""Sound adapters of every type of PEFT's, on every scheme: neither ``assert_prepared`` nor ``watch`` names a fault of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import kbitcheck
from kbitcheck.core.report import Report
from kbitcheck.core.result import Party, Status
from kbitcheck.models.load import quiet
from tests import adapter_types
from tests.adapter_types import peft
from tests.few_steps import of_few_steps

pytestmark = pytest.mark.slow

# Under checkpointing that is not reentrant, bitsandbytes' int8 layers keep their inputs.
OF_THE_STACK = {"int8": {"KB405", "KB406", "KB722"}}
OF_EXPERTS = {"KB901", "KB910"}  # transformers 5 leaves fused ones unquantized, 4 quantizes routers
DEFECTS = {("HRA", "int8"): {"KB302", "KB304"}}  # it reads bytes of int8 for numbers (docs/findings/peft_hra_int8.py)
HALVES = (torch.float16, torch.bfloat16)  # of what trains where PEFT casts nothing, as around torchao's layers
STEPS = 2
OF_PEFT = "0.21."
# What this PEFT refuses without a GPU: a start on packed weights, or a forward that takes their shape or dtype for the layer's.
REFUSED: Mapping[str, tuple[str, ...]] = {
    "DoRA": ("int8",),
    "PiSSA": adapter_types.SCHEMES,
    "LoftQ": adapter_types.SCHEMES,
    "OLoRA": ("torchao-int8",),
    "LoHa": ("nf4",),
    "LoKr": ("nf4",),
    "HRA": ("nf4", "torchao-int8"),
    "SHiRA": ("nf4",),
}


def wrong(report: Report, name: str, scheme: str, model: Any) -> list[Any]:
    """What a report says is wrong, but for what is known of the stack, of models of experts, and of what trains in half precision."""
    stack, known = OF_THE_STACK.get(scheme, set()), OF_EXPERTS if "experts" in name else set()
    if any(p.dtype in HALVES for p in model.parameters() if p.requires_grad):
        known = known | {"KB313"}
    failed = [r for r in report if r.status in (Status.FAIL, Status.ERROR)]
    failed = [r for r in failed if not (r.rule in stack and r.attributed_to is Party.STACK) and r.rule not in known]
    return [(r.rule, r.reason, [(f.where, f.expected, f.actual) for f in r.failures[:2]]) for r in failed]


def prepared(name: str, scheme: str) -> Any:
    adapter_types.needs(scheme)
    try:
        model = adapter_types.prepared(name, scheme)
        refusal = adapter_types.refusal(model)
    except Exception as error:
        model, refusal = None, str(error)
    if peft.__version__.startswith(OF_PEFT) and not torch.cuda.is_available():
        assert bool(refusal) == (scheme in REFUSED.get(name, ())), refusal
    if refusal:
        pytest.skip(f"peft refuses these adapters on this model: {refusal}")
    return model


@pytest.mark.parametrize("scheme", adapter_types.SCHEMES)
@pytest.mark.parametrize("name", adapter_types.ALL)
def test_no_door_names_a_fault_of_sound_adapters(name: str, scheme: str) -> None:
    model = prepared(name, scheme)
    with torch.compiler.set_stance("force_eager"), quiet():
        try:
            report = kbitcheck.assert_prepared(model, select=() if scheme == "nf4" else of_few_steps())
        except kbitcheck.NonConformance as error:
            report = error.report
        assert {"KB102", "KB103", "KB104"} <= {r.rule for r in report if r.status is Status.PASS}
        watched = adapter_types.watched(model, STEPS)
    seen = [wrong(each, name, scheme, model) for each in (report, watched)]
    if defect := DEFECTS.get((name, scheme)):
        assert [defect - {code for code, *_ in each} for each in seen] == [set(), set()]
        return
    assert seen == [[], []]
    assert {"KB104", "KB710", "KB711", "KB715"} <= {r.rule for r in watched if r.status is Status.PASS}
