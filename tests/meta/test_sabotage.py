"""Every rule bites: each registered fault is caught by its own rule, and no rule is without a fault."""

import pytest
import torch

from kbitcheck.core import rules
from kbitcheck.sabotage import Fault, faults
from kbitcheck.sabotage.selftest import Verdict, run, try_fault


def test_every_rule_has_a_fault():
    assert set(rules()) == {fault.code for fault in faults()}


def test_fault_names_are_distinct():
    names = [fault.name for fault in faults()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("fault", faults(), ids=lambda f: f"{f.code}-{f.name}")
def test_its_rule_catches_it(fault: Fault, bases):
    verdict = try_fault(fault, bases)
    if verdict.caught is None:
        pytest.skip(verdict.told)
    assert verdict.caught, verdict.told


def test_a_fault_that_is_none_is_not_caught(bases):
    verdict = try_fault(Fault(code="KB101", name="nothing"), bases)
    assert verdict == Verdict("KB101", "nothing", "tiny:gpt2-nf4-reentrant", False, "passed")


def test_an_accelerators_fault_is_told_apart_on_a_cpu():
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator here")
    (verdict,) = run(["KB602"])
    assert verdict.caught is None
    assert verdict.as_json()["told"] == "needs an accelerator"


def test_faults_do_not_leak_into_the_next_case(bases):
    """The process is as it was: what a fault patched or kept would show in an honest case afterwards."""
    for fault in faults():
        if fault.name in ("class_patched", "seed_set", "one_checkpoint_round_the_whole_stack"):
            try_fault(fault, bases)
    for code in ("KB507", "KB405", "KB508"):
        assert try_fault(Fault(code=code, name="nothing"), bases).told == "passed"
