"""The oracle that goes block by block, and the twin of the whole model: what the one catches, the other does."""

import pytest

from kbitcheck.run.selftest import case_of
from kbitcheck.sabotage import faults
from tests.meta.conftest import of_one_base
from tests.meta.oracles import off_as_of_a_large_one, off_whole_model

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


def each(names):
    """The faults; that of sixteen blocks is slow, as one of two blocks is off by as little."""
    marks = {name: [of_one_base(FAULTS[name]), *([pytest.mark.slow] if name == DEEP else [])] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@each(SMALL)
def test_the_blocks_name_the_place_of_a_small_fault(name, shallow_bases):
    assert off_as_of_a_large_one(case_of(FAULTS[name], shallow_bases))[0] == SMALL[name]


@each([*SMALL][:-1])
def test_the_twin_of_the_whole_model_misses_what_is_smaller_than_its_rounding(name, shallow_bases):
    case = case_of(FAULTS[name], shallow_bases)
    assert off_whole_model(case) == []
    case.close()
