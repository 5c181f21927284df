"""The oracle that goes block by block, and the twin of the whole model: what the one catches, the other does."""

from contextlib import suppress

import pytest

from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.judge.blockwise import gradients_off
from kbitcheck.observe.loaded import Loaded
from kbitcheck.run.selftest import case_of
from kbitcheck.sabotage import faults
from tests.meta.conftest import of_one_base

FAULTS = {fault.name: fault for fault in faults()}
DEEP = "gradient_off_by_a_thousandth_in_one_block_of_sixteen"
# Each small fault with the place that the blocks alone name.
SMALL = {
    DEEP: "model.layers.9: gradient that leaves hidden_states",
    "attention_scale_off_by_a_thousandth": "model.layers.1: gradient that leaves hidden_states",
    "activation_kept_in_bfloat16": "model.layers.1: gradient that leaves hidden_states",
    "scales_the_gradient_between_two_blocks": "model.layers.1: gradient that enters output",
    "embedding_off_by_a_thousandth": "model.layers.0: hidden_states",
    "gradient_of_the_logits_off_by_a_thousandth": "model.layers.1: gradient that enters output",
    "gradient_of_one_head_dropped": "model.layers.1: gradient that leaves hidden_states",
}


def off_whole_model(fault, bases):
    """Places where the twin of the whole model, by itself, sees the fault."""
    case = case_of(fault, bases)
    try:
        seen = [*gradients_off(case.gradients), *gradients_off(case.single_gradients)]
    except (NotApplicable, Unavailable):
        return []
    finally:
        case.close()
    return [observation.where for observation in seen if not observation.ok]


def off_by_blocks(fault, bases, monkeypatch):
    """Places where KB304 sees the fault without a twin of the whole model, as of a large one."""
    case = case_of(fault, bases)
    with suppress(NotApplicable, Unavailable):
        _ = case.run  # the forwards before it are those of a small model, which shares its base's
    with monkeypatch.context() as patch:
        patch.setattr(Loaded, "large", True)
        result = judge(rules()["KB304"], case)
        case.close()
    return [failure.where for failure in result.failures] if result.status is Status.FAIL else []


def each(names):
    """The faults; that of sixteen blocks is slow, as one of two blocks is off by as little."""
    marks = {name: [of_one_base(FAULTS[name]), *([pytest.mark.slow] if name == DEEP else [])] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@each(SMALL)
def test_the_blocks_name_the_place_of_a_small_fault(name, shallow_bases, monkeypatch):
    assert off_by_blocks(FAULTS[name], shallow_bases, monkeypatch)[0] == SMALL[name]


@each([*SMALL][:-1])
def test_the_twin_of_the_whole_model_misses_what_is_smaller_than_its_rounding(name, shallow_bases):
    assert off_whole_model(FAULTS[name], shallow_bases) == []


# Right in the first forward after a preparation, which is the one that is looked at where a large model is prepared anew.
FIRST_IS_RIGHT = "input_hook_works_once"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [fault.name for fault in faults() if not fault.accelerator and fault.name != FIRST_IS_RIGHT]
)
def test_the_blocks_catch_what_the_twin_of_the_whole_model_catches(name, bases, monkeypatch):
    if off_whole_model(FAULTS[name], bases):
        assert off_by_blocks(FAULTS[name], bases, monkeypatch)
