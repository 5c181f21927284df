"""torchao's weights: ordinary linear layers whose parameter is a tensor of another class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference.formats import torchao as oracle
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.config import foreign
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.probes import digest
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


@pytest.mark.skipif(
    "not installed" not in BACKEND.unavailable(), reason="asks what is said without torchao, which is installed"
)
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


@needs_torchao
def test_what_a_weight_wraps_decides_its_digest() -> None:
    model = shallow("tiny:llama").load(Quantization.parse("torchao-int8"))
    layer: Any = next(layer for _, layer in backends.quantized_layers(model))
    before = digest.bits(layer.weight)
    backends.recognition(layer).corrupt(layer, "scale")
    assert digest.bits(layer.weight) != before


@needs_torchao
def test_a_sound_run_under_autocast_conforms() -> None:
    """Its kernel scales each product, and not the weight: a twin's linear layer rounds otherwise."""
    model = prepare_model_for_kbit_training(shallow("tiny:llama").load(Quantization.parse("torchao-int8")))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    with kbitcheck.watch(model, optimizer) as watched:
        model.train()
        for _ in range(3):
            ids = torch.randint(1, 200, (2, 24), generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watched.report.exit_code == 0, watched.report
