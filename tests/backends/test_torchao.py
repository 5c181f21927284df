"""torchao's weights: ordinary linear layers whose parameter is a tensor of another class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training as reference
from kbitcheck_reference.formats import torchao as oracle
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.config import foreign
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe import loaded
from kbitcheck.observe.probes import digest
from kbitcheck.observe.probes.snapshot import snapshot
from tests.few_steps import of_few_steps
from tests.shallow import shallow

BACKEND = registry.of_scheme("torchao-int8")
INSTALLED = not BACKEND.unavailable()
needs_torchao = pytest.mark.skipif(not INSTALLED, reason=BACKEND.unavailable() or "installed")


def test_golden_vectors() -> None:
    codes = torch.tensor([[-128, 0, 127, 3], [1, -1, 64, -64]], dtype=torch.int8)
    rows = oracle.dequantize_int8(codes, torch.tensor([[0.5], [0.25]]))
    assert rows.tolist() == [[-64.0, 0.0, 63.5, 1.5], [0.25, -0.25, 16.0, -16.0]]
    zeros = torch.tensor([[1, 0], [0, 2]], dtype=torch.int8)
    groups = oracle.dequantize_int8(codes, torch.tensor([[0.5, 2.0], [1.0, 0.5]]), zeros)
    assert groups.tolist() == [[-64.5, -0.5, 254.0, 6.0], [1.0, -1.0, 31.0, -33.0]]
    packed = oracle.pack(torch.tensor([[-127.5, 1.0, 63.75]]), "torchao-int8")
    assert packed["qdata"].tolist() == [[-128, 1, 64]]
    assert packed["scale"].tolist() == [[1.0]]


@pytest.mark.skipif("not installed" not in BACKEND.unavailable(), reason="torchao is installed")
def test_without_it_a_model_is_refused_in_one_line_and_a_checkpoint_named() -> None:
    with pytest.raises(UsageError, match=r"torchao is not installed: pip install 'kbitcheck\[torchao\]'"):
        resolve("tiny:llama").load(Quantization.parse("torchao-int8"))
    described = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    assert foreign({"quantization_config": described}) == "torchao"
    assert "torchao-int8" not in registry.run_here()


def test_a_product_without_a_backward_is_refused() -> None:
    described = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}},
    }
    with pytest.raises(UsageError, match="has no backward"):
        BACKEND.described(described)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "source_of", lambda spec: shallow(spec.model))


def report(prepare: Any, codes: Any, mode: Any = "reentrant") -> Any:
    return kbitcheck.check_implementation(
        prepare, models=["tiny:llama"], quants=["torchao-int8"], checkpointing=[mode], strict=True, select=codes
    )


@needs_torchao
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "off"])
def test_the_reference_conforms(mode: str) -> None:
    judged = report(reference, of_few_steps(), mode)
    broken = {
        (r.rule, r.reason or r.failures[:1]) for r in judged.results if judged.counts(r) or r.status.value == "ERROR"
    }
    assert broken == set()


@needs_torchao
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("part", "code"), [("code", "KB205"), ("scale", "KB206")])
def test_a_corrupted_weight_is_caught(part: str, code: str) -> None:
    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        layer = next(layer for _, layer in backends.quantized_layers(model))
        backends.recognition(layer).corrupt(layer, part)
        return model

    assert {r.rule for r in report(prepare, [code]).results if r.status.value == "FAIL"} == {code}


@needs_torchao
@pytest.mark.usefixtures("few")
def test_a_weight_that_is_unpacked_without_a_word_is_caught() -> None:
    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        layer: Any = next(layer for _, layer in backends.quantized_layers(model))
        layer.weight = nn.Parameter(layer.weight.dequantize().detach(), requires_grad=False)
        return model

    assert "KB207" in {r.rule for r in report(prepare, ["KB205", "KB207"]).results if r.status.value == "FAIL"}


@needs_torchao
def test_sizes_without_weights_are_right_to_the_byte() -> None:
    quant = Quantization.parse("torchao-int8")
    real, empty = (snapshot(getattr(shallow("tiny:llama"), how)(quant)) for how in ("load", "meta"))
    assert {n: t.nbytes for n, t in empty.parameters.items()} == {n: t.nbytes for n, t in real.parameters.items()}
    assert {n: layer.scheme for n, layer in empty.layers.items()} == {
        n: layer.scheme for n, layer in real.layers.items()
    }
    assert real.layers


@needs_torchao
def test_what_a_weight_wraps_decides_its_digest() -> None:
    model = shallow("tiny:llama").load(Quantization.parse("torchao-int8"))
    layer: Any = next(layer for _, layer in backends.quantized_layers(model))
    before = digest.bits(layer.weight)
    backends.recognition(layer).corrupt(layer, "scale")
    assert digest.bits(layer.weight) != before
