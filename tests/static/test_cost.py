"""What a prediction costs, in operators: seconds would depend on the machine."""

import dataclasses

import pytest

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.sources.recipe import Recipe
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast import fake_tensors as fake
from kbitcheck.observe.forecast import predict as forecast
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.probes.snapshot import snapshot

MOST_OF_A_BLOCK = 3  # what is passed is handed on, with a place of its own in the graph, and may be cast


@pytest.mark.parametrize("mode", ["off", "non-reentrant"])
def test_deeper_models_cost_hardly_more(mode, monkeypatch):
    asked = []
    dispatch = fake.Counted.__torch_dispatch__

    def counted(self, func, *rest):
        asked.append(func)
        return dispatch(self, func, *rest)

    monkeypatch.setattr(fake.Counted, "__torch_dispatch__", counted)
    counts = []
    for depth in (4, 24):
        found = resolve("tiny:llama")
        assert isinstance(found, Recipe)
        source = dataclasses.replace(found, unread={}, config={**found.config, "num_hidden_layers": depth})
        spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="none", device="cpu")
        model = source.meta(Quantization.parse("nf4"))
        run = forecast.Training(source, model, snapshot(model), spec, Runtime(device="cpu"))
        run.step(2, 40, mode)
        asked.clear()
        run.step(3, 40, mode)  # a shape that was measured is not measured again
        counts.append(sum(f.namespace == "aten" for f in asked))
    assert counts[1] - counts[0] <= MOST_OF_A_BLOCK * 20 < counts[0] / 4


@pytest.mark.parametrize(
    ("implementation", "mode"),
    [
        ("peft", "reentrant"),
        ("peft==0.13.2", "reentrant"),
        ("peft==0.13.2::peft:prepare_model_for_kbit_training", "reentrant"),
        ("peft:prepare_model_for_kbit_training", "reentrant"),
        ("peft.utils.other:prepare_model_for_kbit_training", "reentrant"),
        ("reference", "non-reentrant"),
        ("peft.py:prepare", "non-reentrant"),
        ("peftlike:prepare", "non-reentrant"),
    ],
)
def test_every_version_of_peft_leaves_the_mode_to_torch(implementation, mode):
    assert forecast.default_mode(implementation) == mode
