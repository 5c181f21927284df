"""The answer for a memory size, where the peak's bytes are, and what several GPUs divide."""

import dataclasses
import json
from functools import cache
from unittest import mock

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import ForecastFacts
from kbitcheck.core.memory_sizes import CUBLAS_WORKSPACE, CUDA_CONTEXT
from kbitcheck.models.sources.resolve import source_of
from kbitcheck.observe.forecast import activations, fitting, grid, parts, predict
from kbitcheck.observe.forecast.answer import NOT_BUILT
from kbitcheck.observe.forecast.candidate import Candidate
from kbitcheck.observe.forecast.storages import Trace
from kbitcheck.observe.static import StaticCase

SIZES = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
OVERHEAD = CUDA_CONTEXT + CUBLAS_WORKSPACE
MIB = 1 << 20
pytestmark = pytest.mark.xdist_group("answer")  # several tests read one forecast


@dataclasses.dataclass(frozen=True)
class Opened:
    """A case's forecast, and how many steps were predicted for it."""

    spec: CaseSpec
    forecast: ForecastFacts
    steps: int


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens the case of some options; the same one again for the same options."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SIZES))

    @cache
    def open_case(**options):
        spec = CaseSpec(
            model=str(folder), quant="nf4", implementation="reference", static="always", device="auto", seq_len=512
        )
        spec = dataclasses.replace(spec, **options)
        with mock.patch.object(predict, "measure", wraps=activations.measure) as steps:
            forecast = StaticCase(spec, source_of(spec, static=spec.static)).forecast
        assert forecast.missing == ""
        return Opened(spec, forecast, steps.call_count)

    return open_case


@cache
def candidate_of(spec):
    return Candidate.built(source_of(spec, static=spec.static), spec)


def needed(opened, **options):
    """Bytes of the device for one step with these options, of a model that no forecast has."""
    spec = dataclasses.replace(opened().spec, **options)
    candidate = candidate_of(dataclasses.replace(spec, **NOT_BUILT))
    mode = "non-reentrant" if spec.checkpointing == "default" else spec.checkpointing
    return candidate.needed(spec, candidate.search(spec).step(spec.batch or 1, spec.seq_len, mode).peak)


def test_each_cell_is_a_step_of_its_shape(opened):
    memory = OVERHEAD + 300 * MIB
    forecast = opened(memory=memory, cells=True).forecast
    sizes = {(cell.batch, cell.seq_len): cell.needed for cell in forecast.cells}
    assert set(sizes) == {(b, n) for b in (1, 2, 4, 8, 16) for n in (512, 1024, 2048, 4096)}
    assert sizes[1, 512] == forecast.answer.requested
    for batch, length in ((2, 512), (1, 2048), (16, 4096)):
        assert sizes[batch, length] == needed(opened, batch=batch, seq_len=length)
    assert {cell.needed <= memory for cell in forecast.cells} == {True, False}
    assert opened(memory=memory).forecast.cells == ()


def test_shapes_are_usual_ones_and_the_requested_one():
    assert set(grid.shapes(3, 1000, 1024)) == {(b, n) for b in (1, 2, 3, 4, 8, 16) for n in (512, 1000, 1024)}
    assert {n for _, n in grid.shapes(1, 6, 6)} == {1, 3, 6}
    tokens = [b * n for b, n in grid.shapes(1, 512, 4096)]
    assert tokens == sorted(tokens)


def test_the_curve_has_the_peak_and_turns_after_the_last_block(opened):
    forecast = opened(checkpointing="non-reentrant").forecast
    curve = forecast.curve
    totals = [sum(alive) for alive in zip(*curve.kinds.values(), strict=True)]
    assert max(totals) == forecast.activations["non-reentrant"].peak
    assert len(totals) <= parts.POINTS
    places = [curve.blocks[f"model.layers.{n}"] for n in range(6)]
    assert places == sorted(set(places))
    assert places[-1] <= curve.turn < len(totals) - 1
    assert max(curve.kinds["gradients"][: curve.turn]) == 0
    assert curve.kinds["gradients"][-1] == forecast.adapters
    assert parts.through_the_step(Trace((), ())) is None


def test_what_fits_is_confirmed(opened):
    memory = OVERHEAD + 300 * MIB
    case = opened(memory=memory)
    answer = case.forecast.answer
    assert answer.fits
    assert answer.needed <= memory
    assert answer.batch == case.forecast.largest_batch[memory] > 1
    assert answer.longest == case.forecast.longest[memory] > 512
    assert needed(opened, batch=answer.batch) == answer.needed
    assert needed(opened, batch=answer.batch + 1) > memory


@pytest.mark.parametrize(
    ("options", "smaller", "names"),
    [
        ({"checkpointing": "off", "batch": 4}, {"checkpointing": "non-reentrant"}, {"--checkpointing"}),
        pytest.param({"batch": 16}, {"batch": 8}, {"--batch"}, marks=pytest.mark.slow),
        pytest.param({"rank": 64}, {"rank": 8}, None, marks=pytest.mark.slow),
    ],
)
def test_a_change_makes_it_fit_when_it_is_made(opened, options, smaller, names):
    """The memory is half-way between what the options need and what they need once some of them are smaller."""
    memory = sum(needed(opened, **taken) for taken in (options, {**options, **smaller})) // 2
    answer = opened(memory=memory, **options).forecast.answer
    assert not answer.fits
    assert answer.requested > memory
    assert answer.change is not None
    assert answer.change.needed <= memory
    changed = {option.split()[0]: option.split()[1] for option in answer.change.options}
    assert names is None or set(changed) == names
    values = {name.removeprefix("--").replace("-", "_"): value for name, value in changed.items()}
    numbers = {name: int(value) if value.isdigit() else value for name, value in values.items()}
    assert needed(opened, **{**options, **numbers}) == answer.change.needed


def test_where_nothing_fits_the_closest_is_named(opened):
    answer = opened(memory=OVERHEAD + MIB).forecast.answer
    assert (answer.fits, answer.change) == (False, None)
    assert OVERHEAD + MIB < answer.least.needed < answer.requested


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 3}, {"optimizer": "adamw-8bit"}, {"checkpointing": "off", "batch": 2}]
)
def test_parts_sum_to_the_peak(opened, options):
    forecast = opened(**options).forecast
    kinds: dict[str, int] = {}
    for part in forecast.parts:
        kinds[part.kind] = kinds.get(part.kind, 0) + part.nbytes
    assert sum(kinds.values()) == forecast.total(forecast.mode)
    assert kinds["adapters"] == forecast.adapters
    assert kinds["optimizer"] == forecast.optimizer[options.get("optimizer", "adamw")]
    assert kinds["packed weights"] == sum(g.packed for g in forecast.groups.values())
    if "accumulate" in options:
        assert kinds["gradients"] == forecast.adapters
    else:
        assert kinds["logits and loss"] >= forecast.logits


def test_batches_that_are_added_up_keep_the_gradients(opened):
    once, added = opened().forecast, opened(accumulate=3).forecast
    more = added.activations[added.mode].peak - once.activations[once.mode].peak
    assert 0 < more <= once.adapters


def test_gpus_divide_what_their_strategy_says(opened):
    plain, stored = (opened(gpus=4, **options).forecast for options in ({}, {"quant": "nf4,storage=bf16"}))
    ddp, fsdp, zero = plain.shares
    assert ddp.total == plain.total(plain.mode) + plain.adapters  # the reducer's buckets
    assert fsdp.optimizer == zero.optimizer == plain.optimizer["adamw"] // 4
    packed = sum(g.packed for g in plain.groups.values())
    assert fsdp.weights > packed
    assert "storage=bf16" in fsdp.note
    _, divided, _ = stored.shares
    assert divided.note == ""
    assert fsdp.weights - divided.weights == pytest.approx(packed * 3 / 4, abs=8)
    assert {share.activations for share in (*plain.shares, *stored.shares)} == {ddp.activations}
    # What is in no block stays gathered, and of the blocks two.
    root = sum(g.unquantized + g.upcast.get("peft", 0) for n, g in stored.groups.items() if n in ("embeddings", "head"))
    assert root * 3 // 4 < divided.extra < (root + packed) * 3 // 4


def test_no_step_is_predicted_that_is_not_printed(opened):
    case = opened()
    assert case.forecast.longest == {}
    assert case.steps == 3  # without checkpointing, with it, and under the other autocast
    case = opened(memory=OVERHEAD + 300 * MIB)
    assert case.forecast.longest
    assert 3 < case.steps <= fitting.cost(case.spec).passes.predicted


@pytest.mark.parametrize(
    ("quant", "refused"),
    [("nf4", "float32 and uint8"), ("nf4,storage=bf16", "bfloat16 and float32"), ("nf4,storage=fp32", "")],
)
def test_what_fsdp_says_to_the_dtypes_of_a_unit(opened, quant, refused):
    said = {share.strategy: share.dtypes for share in opened(gpus=2, quant=quant).forecast.shares}
    assert "one dtype trains in each unit, float32" in said["FSDP2"]
    assert ("FSDP of the first version refuses" in said["FSDP2"]) == bool(refused)
    assert refused in said["FSDP2"]
    assert said["DDP"] == ""
