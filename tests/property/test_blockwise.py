"""The oracle that goes block by block: it has the bits of a right step, and names the block of a small fault."""

from functools import lru_cache

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable, UsageError
from kbitcheck.judge.blockwise import tensors_off
from kbitcheck.models.sources import architecture
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.preparation import checkpointed_alone
from kbitcheck.observe.probes.gap import gap
from kbitcheck.observe.twin import twins
from kbitcheck.sabotage import small_gradients as faults
from kbitcheck.sabotage.gradients import scale_after
from kbitcheck.sabotage.hooks import change_output
from tests.architectures import distinct
from tests.shallow import shallow

IN_5 = pytest.mark.transformers5("transformers 4 does not know, load or run it without CUDA")
CELLS = [
    ("tiny:bert", "nf4", "peft"), ("tiny:gemma", "int8", "peft"), ("tiny:gpt2", "fp4", "qlora"),
    ("tiny:llama", "int8", "qlora"), ("tiny:llava", "nf4", "peft"), ("tiny:mixtral", "nf4", "peft"),
    ("tiny:opt", "int8", "qlora"), ("tiny:t5", "int8", "qlora"), ("tiny:whisper", "nf4", "frozen-half"),
    ("arch:mamba2", "nf4", "peft"),  # state-space
    # State-space and attention, experts; blocks that share a block; a block that is called twice.
    *(pytest.param(f"arch:{name}", "nf4", "peft", marks=IN_5) for name in ("jamba", "zamba2", "hrm_text")),
    ("arch:ctrl", "nf4", "peft"),  # no blocks
    ("arch:masked-lm/albert", "nf4", "peft"),
]  # fmt: skip
# What a model's own code spoils, prepared or not.
OWN_FAULTS = {
    "seq2seq-lm/longt5": "casts activations to the dtype of a packed weight",
    "seq2seq-lm/switch_transformers": "casts activations to the dtype of a packed weight",
}
CANNOT_TRAIN = {
    "causal-lm/gemma3n_text": "clamps a packed weight",
    "causal-lm/git": "takes as many labels as tokens and images",
    "causal-lm/longcat_flash": "multiplies with a packed weight",
    "causal-lm/mamba": "multiplies with a packed weight",
    "masked-lm/mobilebert": "concatenates a packed weight",
    "sequence-classification/layoutlmv3": "indexes a packed weight",
}


@lru_cache(maxsize=2)  # as most tests are of one model, and the sweep is of each model once
def base(model, quant, source_of):
    spec = CaseSpec(model=model, quant=quant, implementation="prepare")
    return Loaded.from_source((resolve if model.startswith("arch:") else source_of)(model), spec)


def blockwise(change=lambda model: None, *, model="tiny:llama", quant="nf4", profile="peft", source_of=shallow):
    def prepare(loaded, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        if profile == "peft":
            prepare_model_for_kbit_training(loaded, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        else:
            twins.cast(loaded, profile)
            checkpointed_alone(loaded, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        change(loaded)
        return loaded

    spec = CaseSpec(
        model=model,
        quant=quant,
        profile=profile,
        implementation="prepare",
        checkpointing="off"
        if model.startswith("arch:")
        else "default",  # some cannot checkpoint; the step is plain either way
    )
    return Case(spec, prepare, base(model, quant, source_of)).blockwise


def broken(change, **options):
    return [seen.where for seen in tensors_off(blockwise(change, **options)) if not seen.ok]


@pytest.mark.parametrize(("model", "quant", "profile"), CELLS)
def test_a_right_step_has_the_bits_of_the_twin_in_the_same_dtypes(model, quant, profile):
    facts = blockwise(model=model, quant=quant, profile=profile)
    gaps = [*(g for part in facts.parts.values() for g in part.gaps.values()), *facts.adapters.values()]
    assert len(facts.parts) > 2 or model in ("arch:ctrl", "arch:masked-lm/albert")
    # Where a tensor has several readers, as T5's encoder states, their gradients add in another order.
    assert sum(not g.bitwise for g in gaps) <= (3 if model == "tiny:t5" else 0)
    assert all(seen.ok for seen in tensors_off(facts))


def add_in_another_order(model):
    """Each linear layer adds its products in another order, as another kernel does."""
    linear = torch.nn.functional.linear

    def permuted(x, weight, bias=None):
        order = torch.randperm(weight.shape[-1], generator=torch.Generator().manual_seed(0))
        return linear(x[..., order], weight[:, order], bias)

    def choose(function):
        def hook(*_):
            torch.nn.functional.linear = function

        return hook

    model.register_forward_pre_hook(choose(permuted))
    model.register_forward_hook(choose(linear), always_call=True)


REORDERED = [
    ("tiny:llama", "nf4"),
    ("tiny:bert", "int8"),
    ("tiny:mixtral", "nf4"),
    ("tiny:gpt2", "int8"),
    ("tiny:t5", "nf4"),
]


@pytest.mark.parametrize(("model", "quant"), REORDERED)
def test_sums_in_another_order_are_not_off(model, quant):
    facts = blockwise(add_in_another_order, model=model, quant=quant)
    assert sum(not g.bitwise for g in facts.adapters.values()) > len(facts.adapters) / 2
    assert [seen for seen in tensors_off(facts) if not seen.ok] == []


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (faults.scales_the_gradient_between_two_blocks, "model.layers.1: gradient that enters output"),
        (faults.embedding_off_by_a_thousandth, "model.layers.0: hidden_states"),
        (faults.gradient_of_the_logits_off_by_a_thousandth, "model.layers.1: gradient that enters output"),
    ],
)
def test_a_scale_shows_where_sums_are_in_another_order(fault, where):
    def change(model):
        fault(model)
        add_in_another_order(model)

    assert broken(change) == [where]


# Sums in another order fall to the other side of a near tie on some processors.
CHOOSES = {"causal-lm/reformer": "it attends within buckets, and a hash chooses the bucket of each token"}


def off(change, name):
    """A tensor of an architecture that is off, or the error; none if there is none, None if the architecture was not judged."""
    try:
        seen = list(tensors_off(blockwise(change, model=f"arch:{name}")))
    except (Unavailable, UsageError):  # it cannot be loaded, trained or run in float64
        return None
    except (RuntimeError, ValueError, IndexError) as error:
        return str(error)
    return next((f"{o.where}: {o.actual}" for o in seen if not o.ok), "")


@pytest.mark.slow
@pytest.mark.transformers5("transformers 4 does not know all of these")
@pytest.mark.parametrize("task", architecture.TASKS)
def test_no_architecture_is_off(task):
    """False alarms: of every architecture that loads and trains, no tensor is off; nor is it if sums are in another order."""
    names = [f"{task}/{kind}" for kind in distinct(task)]
    excused = {**OWN_FAULTS, **CANNOT_TRAIN}
    ways = {(lambda model: None): excused}
    if task == architecture.CAUSAL_LM:
        ways[add_in_another_order] = {**excused, **CHOOSES}
    places = {(name, change): off(change, name) for name in names for change in ways}
    for change, expected in ways.items():
        of_this = {name: places[name, change] for name in names if places[name, change] is not None}
        assert len(of_this) > len(names) / 2
        assert {name: where for name, where in of_this.items() if where and name not in expected} == {}


def scale_gradient(model):
    scale_after(model.model.layers[1].input_layernorm, 1.001)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize(
    "fault", [scale_gradient, faults.attention_scale_off_by_a_thousandth, faults.gradient_of_one_head_dropped]
)
def test_a_small_fault_shows_in_its_block_alone(fault, quant):
    where = broken(fault, quant=quant)
    assert where
    assert all(".layers.1" in place for place in where)


def scale_logits(model):
    change_output(model.lm_head, lambda x: x * 1.001)


def drop_the_mask(model):
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (faults.scales_the_gradient_between_two_blocks, "model.layers.1: gradient that enters output"),
        (faults.embedding_off_by_a_thousandth, "model.layers.0: hidden_states"),
        (scale_logits, "loss"),
        (drop_the_mask, "model.layers.1: attention_mask"),
    ],
)
def test_a_fault_between_the_blocks_shows_at_its_joint(fault, where):
    assert where in broken(fault)


def test_a_block_that_runs_in_the_place_of_another_shows():
    def run_again(model):
        layers = model.model.layers
        own = layers[2]

        def put(block):
            def hook(*_):
                layers[2] = block

            return hook

        model.model.register_forward_pre_hook(put(layers[1]))
        model.model.register_forward_hook(put(own), always_call=True)

    where = broken(run_again, source_of=resolve)
    assert "model.layers.1 (call 2): hidden_states" in where
    assert "model.layers.2 (a call that was left out): output" in where


def test_what_a_cut_leaves_without_gradient_is_live_in_the_twin():
    def cut(model):
        model.model.layers[1].register_forward_hook(lambda m, args, output: output.detach())

    facts = blockwise(cut)
    first = {name: g for name, g in facts.adapters.items() if ".layers.0." in name}
    assert first
    assert all(g.live and g.norm is None for g in first.values())


def test_an_imaginary_part_counts():
    rotary = torch.polar(torch.ones(3), torch.tensor([0.0, 1.0, 2.0]))
    assert gap(rotary, rotary.to(torch.complex128), rotary).bitwise
    assert gap(rotary.conj(), rotary.to(torch.complex128), rotary).error > 0.5


def test_a_missing_tensor_is_zero():
    one, none = torch.ones(2), torch.zeros(2, dtype=torch.float64)
    assert gap(None, None, None).bitwise
    assert gap(one, none, None).error == float("inf")
    assert gap(None, one.double(), one).error == 1
    assert gap(one, one.double(), one).error == 0
    assert not gap(one, none, one).live
