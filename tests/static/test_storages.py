"""The storages of a whole step, from one in which blocks that compute the same did not run."""

import dataclasses
import json

import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.sources.recipe import Recipe
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast import predict
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.probes.snapshot import snapshot

ALTERNATING = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "sliding_window": 16,
}


RUNTIME = Runtime(autocast=torch.bfloat16)


def training(source, runtime=RUNTIME):
    spec = CaseSpec(model=source.name, quant="nf4", implementation="none", device=runtime.device)
    model = source.meta(Quantization.parse("nf4"))
    return predict.Training(source, model, snapshot(model), spec, runtime)


@pytest.fixture
def source(recipe, tmp_path):
    if recipe == "gemma2":
        (tmp_path / "config.json").write_text(json.dumps(ALTERNATING))
        return resolve(str(tmp_path), static="always")
    whole = resolve(f"tiny:{recipe}")
    assert isinstance(whole, Recipe)
    return dataclasses.replace(whole, unread={}, config={**whole.config, "num_hidden_layers": 6})


EACH = [(recipe, mode) for recipe in ("llama", "mixtral", "gemma2") for mode in ("off", "reentrant", "non-reentrant")]
SOME = (("llama", "off"), ("mixtral", "non-reentrant"), ("gemma2", "reentrant"))


@pytest.mark.parametrize(
    ("recipe", "mode"), [cell if cell in SOME else pytest.param(*cell, marks=pytest.mark.slow) for cell in EACH]
)
def test_blocks_that_did_not_run_make_and_free_what_they_would(source, mode, monkeypatch):
    step = training(source).step(2, 40, mode)
    thinned = step.trace()
    monkeypatch.setattr(predict, "thin", lambda model: None)
    whole = training(source).step(2, 40, mode).trace()
    assert len(step.log.events) < len(whole.events)
    assert thinned.places == whole.places
    assert thinned.storages == whole.storages
    assert thinned.peak == step.peak


@pytest.mark.parametrize("recipe", ["llama", "mixtral", "gemma2"])
def test_storages_are_of_their_blocks_and_kinds(source):
    trace = training(source).step(2, 40, "off").trace()
    blocks = {s.block for s in trace.at_peak() if s.kind == "activations"}
    assert {f"model.layers.{i}" for i in range(4)} <= blocks
    gradients = sum(s.nbytes for s in trace.storages if s.kind == "gradients")
    assert gradients == trace.places[-1] - sum(
        s.nbytes for n, s in enumerate(trace.storages) if s.kind != "gradients" and ~n not in trace.events
    )
