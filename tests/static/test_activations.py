"""Predicted steps against measured ones, on the CPU."""

import dataclasses
import gc
import json
import logging
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.blocks import signature
from kbitcheck.models.inputs import choose
from kbitcheck.models.sources import resolve as sources
from kbitcheck.models.sources.recipe import Recipe
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe import internals
from kbitcheck.observe.forecast import activations, fitting
from kbitcheck.observe.forecast import predict as forecast
from kbitcheck.observe.forecast.fake_tensors import Counted, World
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.thinning import Passed, thin
from kbitcheck.observe.probes import adapters, memory, step, switches
from kbitcheck.observe.probes.snapshot import snapshot
from tests.shallow import shallow

CLOSE = 0.02
MEASURED = Runtime(device="cpu", keeps_output=True)  # as the probes measure

EXACT = pytest.mark.transformers5("keeps other tensors, or looks at numbers")
# The whole recipes once; what is passed in blocks that are alike is confirmed below and in test_storages.py.
GRID = [
    ("llama", "int8", "non-reentrant", 3, 48, "reference", resolve),
    ("llama", "nf4,double", "reentrant", 2, 40, "peft", shallow),
    ("gpt2", "fp4", "reentrant", 2, 32, "reference", shallow),
    pytest.param("t5", "nf4", "non-reentrant", 2, 40, "reference", resolve, marks=EXACT),
    ("mixtral", "nf4", "reentrant", 2, 60, "reference", shallow),
    pytest.param("llava", "nf4", "non-reentrant", 2, 24, "reference", shallow, marks=[EXACT, pytest.mark.slow]),
    pytest.param("whisper", "nf4", "reentrant", 2, 20, "reference", shallow, marks=[EXACT, pytest.mark.slow]),
    pytest.param("gemma", "nf4", "non-reentrant", 1, 16, "reference", resolve, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "quant", "mode", "batch", "length", "library", "source_of"), GRID)
def test_a_step_holds_what_was_predicted(recipe, quant, mode, batch, length, library, source_of):
    if library == "peft":
        pytest.importorskip("peft")
    source = source_of(f"tiny:{recipe}")
    model = source.load(Quantization.parse(quant))
    made = source.batch(model, batch=batch, seq_len=length)
    prepare_model_for_kbit_training(model, True, {"use_reentrant": mode == "reentrant"})
    targets = adapters.target_layers(model, "all-linear")
    wrapped, owned = adapters.attach(model, targets, library=library, rank=4, seed=0)
    step.train_step(wrapped, made, owned)
    measured = memory.activations(wrapped, made, seed=0)
    with switches.checkpointing_off(wrapped):
        peak = memory.measure(wrapped, made, 0).peak
    predicted, told = training(source, quant, checkpointing=mode, adapters=library)
    plain, held = predicted.step(batch, length, "off"), predicted.step(batch, length, mode)
    assert plain.held == pytest.approx(measured.plain, rel=CLOSE)
    assert plain.peak == pytest.approx(peak, rel=CLOSE)
    assert held.held == pytest.approx(measured.held, rel=CLOSE)
    assert held.peak == pytest.approx(measured.peak, rel=CLOSE)
    assert told.adapters == sum(p.nbytes for p in owned.values())


@pytest.mark.parametrize("recipe", ["llama", "mixtral", pytest.param("t5", marks=EXACT)])
@pytest.mark.parametrize("mode", ["off", "reentrant", "non-reentrant"])
def test_collections_of_what_is_young_free_what_full_ones_do(mode, recipe, monkeypatch):
    def places():
        predicted, _ = training(resolve(f"tiny:{recipe}"), "int8", checkpointing="reentrant")
        measured = predicted.step(2, 24, mode)
        return measured.held, measured.places

    young = places()
    full = Mock(side_effect=gc.collect)
    monkeypatch.setattr(activations, "collect_young", full)
    assert places() == young
    assert full.called


def plain_llama(depth=4):
    """The recipe without the parameter that one of its blocks has to itself."""
    source = resolve("tiny:llama")
    assert isinstance(source, Recipe)
    return dataclasses.replace(source, unread={}, config={**source.config, "num_hidden_layers": depth})


def training(source, quant, *, runtime=MEASURED, **options):
    spec = CaseSpec(model=source.name, quant=quant, implementation="none", device=runtime.device, **options)
    model = source.meta(Quantization.parse(quant))
    facts = snapshot(model)
    told = forecast.of_weights(model, facts, spec)
    return forecast.Training(source, model, facts, spec, runtime), told


@pytest.mark.parametrize(
    "mode", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("off", "non-reentrant")), "reentrant"]
)
def test_blocks_that_are_passed_count_as_if_they_ran(mode, monkeypatch):
    measured = []
    for thinned in (True, False):
        if not thinned:
            monkeypatch.setattr(forecast, "thin", lambda model: None)
        predicted, _ = training(plain_llama(depth=5), "nf4")
        steps = predicted.step(2, 40, mode), predicted.step(1, 3, mode)
        measured.append([(s.held, s.peak) for s in steps])
    assert measured[0] == measured[1]


@pytest.mark.transformers5("multiplies with the packed weight of the projector before")
def test_an_image_takes_the_tokens_that_the_model_computes(tmp_path):
    """Gemma 3 pools its patches: 16 of them become one token."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16,
            "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 512}  # fmt: skip
    vision = {"hidden_size": 32, "image_size": 32, "patch_size": 2, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 16,
              "image_token_index": 299, "text_config": text, "vision_config": {**vision, "intermediate_size": 64}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = CaseSpec(model=str(tmp_path), quant="nf4", implementation="none", device="cpu", static="always")
    source = sources.source_of(spec, static="always")
    predicted, _ = training(source, "nf4")
    assert predicted.limit == 512 - 16
    assert predicted.notes == ("each sequence has an image of 32 × 32 pixels, 16 tokens, beside its text",)
    assert predicted.step(2, 20, "off").logits == 4 * 2 * (20 + 16) * 300


def test_nothing_runs_to_choose_a_batch(monkeypatch):
    """Kernels would read and write memory that fake tensors do not have."""
    run = Mock()
    monkeypatch.setattr(choose, "first_fitting", run)
    predicted, _ = training(resolve("tiny:whisper"), "nf4")
    assert predicted.step(2, 20, "off").held > 0
    run.assert_not_called()


@pytest.mark.parametrize(
    ("recipe", "off"), [("llama", 0), pytest.param("t5", 0, marks=EXACT), pytest.param("mixtral", CLOSE, marks=EXACT)]
)
def test_autocast_on_the_cpu_is_predicted_as_measured(recipe, off):
    """To the byte; experts get shares of the tokens that are not even.

    T5 hands biases from block to block, which it drops before the loss: a probe that keeps them measures too much. Autocast casts
    the weights of each expert: a forecast of one that is not there says too much.
    """
    source, wanted = resolve(f"tiny:{recipe}"), Quantization.parse("nf4")
    model = source.load(wanted)
    made = source.batch(model, batch=2, seq_len=40)
    prepare_model_for_kbit_training(model, True, {"use_reentrant": False})
    wrapped, owned = adapters.attach(
        model, adapters.target_layers(model, "all-linear"), library="reference", rank=4, seed=0
    )
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    step.train_step(wrapped, made, owned, autocast=autocast)
    runtime = dataclasses.replace(MEASURED, autocast=torch.bfloat16)
    predicted, _ = training(source, "nf4", runtime=runtime)
    for mode in ("off", "non-reentrant"):
        with switches.checkpointing_off(wrapped) if mode == "off" else nullcontext():
            measured = memory.measure(wrapped, made, 0, autocast)
        forecasted = predicted.step(2, 40, mode)
        for told, seen in ((forecasted.held, measured.held), (forecasted.peak, measured.peak)):
            assert told == pytest.approx(seen, rel=off, abs=0), mode


@pytest.mark.parametrize(("recipe", "quant"), [("llama", "int8"), ("mixtral", "nf4")])
def test_a_step_on_cuda_is_predicted_without_cuda(recipe, quant):
    predicted, _ = training(resolve(f"tiny:{recipe}"), quant, runtime=Runtime())
    plain, held = predicted.step(2, 40, "off"), predicted.step(2, 40, "non-reentrant")
    assert 0 < held.held < plain.held < plain.peak


def test_the_backward_of_softmax_takes_its_scores_once_more_on_cuda():
    peaks = {}
    for device in ("cpu", "cuda"):
        world = World()
        with world.mode:
            scores = torch.empty(4, 256, 256, requires_grad=True)
            live = Counted([scores], device)
            with live:
                scores.softmax(-1).backward(torch.empty_like(scores))
        peaks[device] = max(live.trace)
    assert peaks["cuda"] - peaks["cpu"] == scores.nbytes


class Block(nn.Module):
    def __init__(self, width, place):
        super().__init__()
        self.inner = nn.Linear(width, 4)
        self.layer_idx = place
        self.window = None


def test_blocks_are_alike_whatever_their_place():
    one, other = Block(4, 0), Block(4, 1)
    assert signature(one) == signature(other)
    other.window = 8
    assert signature(one) != signature(other)
    assert signature(one) != signature(Block(5, 0))
    frozen = Block(4, 0)
    frozen.inner.weight.requires_grad_(False)
    assert signature(one) != signature(frozen)


def test_only_blocks_between_are_passed():
    model = plain_llama().meta(Quantization.parse("nf4"))
    thin(model)
    assert [n for n, m in model.named_modules() if isinstance(m, Passed)] == ["model.layers.2"]
    assert "model.layers.2.mlp.up_proj" not in dict(model.named_modules())
    assert model.model.layers[2].self_attn.layer_idx == 2


def test_blocks_of_two_kinds_are_not_taken_for_each_other():
    model = plain_llama().meta(Quantization.parse("nf4"))
    model.model.layers[2].self_attn.is_causal = False
    thin(model)
    assert not [n for n, m in model.named_modules() if isinstance(m, Passed)]


def test_an_assertion_of_our_own_is_no_property_of_the_model(monkeypatch):
    source = resolve("tiny:llama")
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="none", device="cpu")
    model = source.meta(Quantization.parse("nf4"))
    facts = snapshot(model)
    weights = forecast.of_weights(model, facts, spec)

    def asserts(input_ids=None, **kwargs):
        assert input_ids is None

    model.forward = asserts
    assert fitting.with_steps(weights, source, model, facts, spec).missing.startswith("AssertionError")
    model = source.meta(Quantization.parse("nf4"))
    monkeypatch.setattr(forecast, "thin", lambda model: Passed(model, model).forward())
    with pytest.raises(AssertionError):
        fitting.with_steps(weights, source, model, facts, spec)


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


def test_torch_logs_nothing_of_a_step_that_fails(monkeypatch):
    kept, world = Kept(), World()
    monkeypatch.setattr(logging.getLogger(internals.FakeTensor.__module__), "handlers", [kept])
    with world.mode:
        rows, columns = torch.empty(2, 3), torch.empty(4, 5)
    with world.entered(MEASURED), pytest.raises(RuntimeError, match="same reduction dim"):
        torch.mm(rows, columns)
    assert kept.records == []


def test_a_model_that_cannot_be_fed_still_has_weights():
    source = resolve("tiny:llama")
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="none", device="cpu")
    model = source.meta(Quantization.parse("nf4"))
    facts = snapshot(model)
    told = forecast.of_weights(model, facts, spec)

    def refuses(input_ids=None, **kwargs):
        raise RuntimeError("looks at numbers\nand more")

    model.forward = refuses
    full = fitting.with_steps(told, source, model, facts, spec)
    assert full.missing.startswith("RuntimeError: looks at numbers (test_activations.py:")
    assert full.loaded == told.loaded
    assert full.total("off") is None
