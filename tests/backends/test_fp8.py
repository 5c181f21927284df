"""Fine-grained FP8: the format, transformers' own backward, and the product that stands in for its GPU kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference import dequantized_weight, is_quantized
from kbitcheck_reference.formats import fp8 as oracle
from torch import nn

from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.observe.probes.snapshot import layer
from tests.shallow import shallow

BACKEND = registry.of_scheme("fp8")
runs_here = pytest.mark.skipif(bool(BACKEND.not_on_load()), reason=BACKEND.not_on_load() or "runs here")


def codes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_golden_vectors() -> None:
    # Sign, four bits of exponent (bias 7), three of mantissa: 1.0, 448, -1.125, the smallest number 2^-9.
    packed = codes(0b0_0111_000, 0b0_1111_110, 0b1_0111_001, 0b0_0000_001, 0, 0b0_1000_000).view(2, 3)
    scale = torch.tensor([[2.0, 0.5], [1.0, 4.0]])
    assert oracle.dequantize_fp8(packed, scale, (1, 2)).tolist() == [[2.0, 896.0, -0.5625], [2.0**-9, 0.0, 8.0]]
    assert oracle.dequantize_fp8(packed, torch.tensor(0.5), None)[0].tolist() == [0.5, 224.0, -0.5625]
    with pytest.raises(ValueError, match="cannot have"):
        oracle.dequantize_fp8(packed, scale, (2, 2))


def test_packing_puts_the_largest_number_of_a_block_at_448() -> None:
    packed = oracle.pack(torch.tensor([[1.0, -2.0, 0.0], [0.5, 1.03, 0.0]]), "fp8", (2, 2))
    assert packed["weight_scale_inv"].tolist() == [[torch.tensor(2 / 448).item(), 1.0]]
    assert packed["weight"].float().tolist() == [[224.0, -448.0, 0.0], [112.0, 224.0, 0.0]]  # 230.7 between 224 and 240


def test_inputs_are_rounded_by_tiles_of_a_row() -> None:
    x = torch.tensor([[448.0, 17.0, 0.0], [1.0, 0.0, 0.0]])
    assert oracle.round_input(x, 2).tolist() == [[448.0, 16.0, 0.0], [1.0, 0.0, 0.0]]  # 17: a tie, to even


@runs_here
def test_the_backward_of_transformers_is_the_product_with_the_oracle_s_weight() -> None:
    model = shallow("tiny:llama").load(Quantization.parse("fp8,block=32"))
    layer: Any = next(layer for _, layer in backends.quantized_layers(model))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.double(), dy.double() @ dequantized_weight(layer), rtol=1e-4, atol=1e-6)
    rounded = backends.arithmetic(layer).round_input(layer, x.detach())
    assert not rounded.equal(x)
    torch.testing.assert_close(y.double(), rounded.double() @ dequantized_weight(layer).T, rtol=1e-4, atol=1e-6)


@runs_here
def test_modules_that_compute_in_float32_stay() -> None:
    model = shallow("tiny:t5").load(Quantization.parse("fp8"))
    names = {n for n, _ in backends.quantized_layers(model)}
    assert names
    assert not any(name.endswith(".wo") for name in names)


@runs_here
def test_a_model_is_marked_as_transformers_marks_it() -> None:
    model: Any = shallow("tiny:llama").load(Quantization.parse("fp8,block=32,skip=mlp"))
    assert str(model.quantization_method).rpartition(".")[2].lower() == "fp8"
    assert model.config.quantization_config.weight_block_size == (32, 32)
    assert not any("mlp" in name for name, _ in backends.quantized_layers(model))
    scales = [p for n, p in model.named_parameters() if n.endswith("weight_scale_inv")]
    assert scales
    assert all(scale.requires_grad for scale in scales)


@runs_here
def test_layers_of_groups_are_no_product_with_one_weight() -> None:
    from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

    make: Any = FP8GroupedLinear
    layer: nn.Module = make(4, 8, 2)
    assert backends.of(layer) is None
    assert is_quantized(layer)  # its scales are never cast, all the same


@pytest.mark.skipif(
    not BACKEND.not_on_load(), reason="asks what is said where FP8 layers have no backward; here they have one"
)
def test_without_a_backward_it_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="have a backward in transformers"):
        shallow("tiny:llama").load(Quantization.parse("fp8"))


def test_a_block_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown block '7'; known: 128, 32"):
        Quantization.parse("fp8,block=7")


@runs_here
def test_steps_below_what_inputs_are_rounded_by_say_nothing_of_the_loss() -> None:
    name, module = next(backends.quantized_layers(shallow("tiny:llama").load(Quantization.parse("fp8"))))
    ulp = layer(name, module).input_ulp
    one = torch.tensor([1.0, 1.0 + 0.49 * ulp, 1.0 + 0.51 * ulp]).to(torch.float8_e4m3fn)
    assert one.float().tolist() == [1.0, 1.0, 1.0 + ulp]
