"""Steps in any order leave the next training step what a fresh model's would be: for each implementation and quantization.

A program is drawn as a list of names, so that a failure prints as one, and ``Session`` replays it.
"""

import gc
import itertools
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from kbitcheck.core.cases import CaseSpec
from kbitcheck.observe.case import Case
from kbitcheck.observe.interleaving import STEPS
from kbitcheck.observe.loaded import Loaded
from kbitcheck.run.subject import load
from kbitcheck.sabotage import faults
from tests.shallow import shallow

pytestmark = pytest.mark.xdist_group("interleaving")  # of four bases
MOVES = {
    "dispatch",
    "undispatch",
    "offload-to-disk",
    "reload",
    "state-dict",
}  # dear ones, which no fault searched for here needs
QUANTS = ("nf4", "nf4,double,storage=bf16", "fp4,compute=fp32", "int8")
FAST = {("reference", "nf4,double,storage=bf16"), ("reference", "int8"), ("peft", "fp4,compute=fp32"), ("peft", "nf4")}
CELLS = [
    pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow)
    for cell in itertools.product(("reference", "peft"), QUANTS)
]


def case_of(implementation, quant, bases, *, prepare=None, model="tiny:gpt2"):
    spec = CaseSpec(model=model, quant=quant, implementation=implementation, checkpointing="reentrant")
    key = (shallow, model, quant)  # not the bases of whole recipes
    if key not in bases:
        bases[key] = Loaded.from_source(shallow(model), spec)
    return Case(spec, prepare or load(implementation).function, bases[key])


def faulty(outcome):
    """What an outcome breaks, on one line."""
    wrong = [n for n, d in outcome.gradients.items() if not d.equal]
    return " ".join(
        map(str, (*outcome.changed[:1], outcome.raised or "", *wrong[:1], outcome.hooks_added or ""))
    ).strip()


def machine(case):
    class Interleaving(RuleBasedStateMachine):
        @initialize()
        def load(self):
            self.session = case.session()
            self.program = []

        @rule(name=st.sampled_from([s for s in STEPS if s != "train"]))
        def step(self, name):
            self.do(name)

        @rule()
        def train(self):
            self.do("train")

        def do(self, name):
            self.program.append(name)
            assert (self.program, faulty(self.session.do(name))) == (self.program, "")

    return Interleaving


QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.parametrize(("implementation", "quant"), CELLS)
def test_any_order_of_steps_leaves_training_as_it_was(implementation, quant, bases):
    if implementation == "peft":
        pytest.importorskip("peft")
    run_state_machine_as_test(
        machine(case_of(implementation, quant, bases)),
        settings=settings(max_examples=4, stateful_step_count=12, derandomize=True, phases=[Phase.generate], **QUIET),
    )


SMALL = """
architecture = "GPT2LMHeadModel"
dtype = "bf16"
seq_len = 6

[config]
model_type = "gpt2"
vocab_size = 24
n_positions = 16
n_embd = 32
n_inner = 32
n_layer = 2
n_head = 2
attn_pdrop = 0.0
embd_pdrop = 0.0
resid_pdrop = 0.0
bos_token_id = 1
eos_token_id = 2
pad_token_id = 0
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that takes a step in milliseconds, as a search needs hundreds."""
    file = tmp_path_factory.mktemp("recipes") / "small.toml"
    file.write_text(SMALL)
    return str(file)


def smallest(case, examples):
    """The shortest program found that breaks something, or None."""
    found = []

    @seed(0)
    @settings(max_examples=examples, report_multiple_bugs=False, **QUIET)
    @given(st.lists(st.sampled_from([step for step in STEPS if step not in MOVES]), min_size=1, max_size=12))
    def search(program):
        session = case.session()
        for name in program:
            if faulty(session.do(name)):
                found.append(program)
                raise AssertionError(program)

    with pytest.raises(AssertionError):
        search()
    return found[-1]


@pytest.mark.slow
def test_a_fault_that_needs_three_steps_is_found_and_shrunk_to_them(bases, small):
    fault = next(f for f in faults() if f.name == "third_step_in_a_row_forgets")
    program = smallest(case_of("fault", "nf4", bases, prepare=fault.prepare, model=small), 60)
    assert len(program) == 3
    assert set(program[:2]) <= {"evaluate", "generate", "infer"}
    assert program[2] in ("train", "accumulate")


@pytest.mark.slow
@pytest.mark.skipif(not has_avx512bf16(), reason="no AVX512-BF16: bitsandbytes repacks nothing here")
def test_the_repacking_of_bitsandbytes_is_found_where_it_is_not_switched_off(small):
    """Told nothing but to take steps, on a model that loads as a user's does."""
    own: dict[Any, Loaded] = {}
    case = case_of("reference", "nf4", own, model=small)
    for module in next(iter(own.values())).pristine.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    program = smallest(case, 40)
    assert program in (["evaluate"], ["infer"], ["generate"])


def test_a_sessions_packed_weights_are_watched(bases):
    case = case_of("reference", "nf4", bases)
    session = case.session()
    layer = next(m for m in session.model.modules() if hasattr(getattr(m, "weight", None), "quant_state"))
    with torch.no_grad():
        layer.weight.data.view(-1)[0] ^= 1
    assert session.do("train-mode").changed


def alive():
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize(
    "quant", ["nf4", pytest.param("int8", marks=pytest.mark.transformers5("refuses to move an 8-bit model"))]
)
def test_memory_returns(quant, bases, small):
    """Rounds of steps leave as many tensors as the round before; one that is hoarded would be counted."""
    session = case_of("reference", quant, bases, model=small).session()
    counts = []
    for _ in range(3):
        for name in ("train", "evaluate", "infer", "generate", "accumulate", "save", "move"):
            assert faulty(session.do(name)) == ""
        counts.append(alive())
    assert counts[1] == counts[2]
    hoard = []
    session.model.register_forward_hook(lambda module, args, output: hoard.append(output.loss))
    session.do("train")
    assert alive() > counts[2]
