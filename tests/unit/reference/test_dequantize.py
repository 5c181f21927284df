"""Float64 dequantization: golden values, and agreement with bitsandbytes to the rounding of its output."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from kbitcheck_reference import (
    dequantized_weight,
)
from kbitcheck_reference.formats.bitsandbytes import (
    FP4,
    NF4,
    dequantize_absmax,
    dequantize_blockwise4,
    dequantize_int8,
)
from torch import nn

bnb: Any = bitsandbytes  # its types are incomplete
F = bnb.functional
U32 = 2.0**-24  # unit roundoff of float32
TABLES = {"nf4": NF4, "fp4": FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_tables_are_the_published_float32_values(name: str) -> None:
    assert TABLES[name].dtype == torch.float64
    assert torch.equal(TABLES[name].float(), F.get_4bit_type(name, device="cpu"))
    assert torch.equal(TABLES[name], TABLES[name].float().double())


def test_the_high_nibble_comes_first() -> None:
    packed = torch.tensor([[0x0F], [0x7E]], dtype=torch.uint8)
    got = dequantize_blockwise4(packed, torch.tensor([2.0]), NF4, 64, (2, 2))
    assert got.tolist() == [[-2.0, 2.0], [0.0, 2 * 0.7229568362236023]]


def test_fp4_golden_values() -> None:
    packed = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8)
    got = dequantize_blockwise4(packed, torch.tensor([12.0]), FP4, 16, (16,))
    positive = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert got.tolist() == pytest.approx(positive + [-value for value in positive], rel=2 * U32)


def test_blocks_run_along_the_flattened_weight_and_the_last_may_be_short() -> None:
    packed = torch.full((5,), 0xFF, dtype=torch.uint8)
    got = dequantize_blockwise4(packed, torch.tensor([1.0, 2.0, 3.0]), NF4, 4, (3, 3))
    assert got.tolist() == [[1, 1, 1], [1, 2, 2], [2, 2, 3]]


def test_double_quantization_golden_values() -> None:
    code = torch.arange(256, dtype=torch.float32) / 256
    absmax = torch.tensor([[128], [64], [255]], dtype=torch.uint8)
    got = dequantize_absmax(absmax, code, torch.tensor([2.0, 4.0]), 2, torch.tensor(10.0))
    assert got.dtype == torch.float64
    assert got.tolist() == [11.0, 10.5, 10 + 4 * 255 / 256]


def test_int8_golden_values() -> None:
    got = dequantize_int8(torch.tensor([[127, -127], [1, 0]], dtype=torch.int8), torch.tensor([3.0, 127.0]))
    assert got.tolist() == [[3.0, -3.0], [1.0, 0.0]]


def test_too_little_data_is_refused() -> None:
    packed = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="4 codes of 4 bits, fewer than the 5 wanted"):
        dequantize_blockwise4(packed, torch.ones(2), NF4, 4, (5,))
    with pytest.raises(ValueError, match="need 2 scales, got 1"):
        dequantize_blockwise4(packed, torch.ones(1), NF4, 2, (4,))
    with pytest.raises(ValueError, match="2 rows need as many scales, got 1"):
        dequantize_int8(torch.zeros(2, 3, dtype=torch.int8), torch.ones(1))


def rounding_bound(exact: torch.Tensor, state: Any) -> torch.Tensor:
    """What bitsandbytes may be off by: one rounding to its dtype, and a few in float32 on the way there."""
    output = torch.finfo(state.dtype)
    scale = state.state2.absmax.abs().max() + state.offset.abs() if state.nested else state.absmax.abs().max()
    bound: torch.Tensor = exact.abs() * output.eps / 2 + 4 * U32 * scale.double() + output.smallest_normal * output.eps
    return bound


def dequantized_by_bitsandbytes(packed: torch.Tensor, absmax: torch.Tensor, state: Any) -> list[torch.Tensor]:
    """Results of its portable implementation, and of the kernel that runs here where that can be trusted.

    The AVX-512 kernel of bitsandbytes 0.50.2 takes ``row * (columns // blocksize)`` for a row's first block, which is
    wrong where a block spans rows.
    """
    with torch.compiler.set_stance("force_eager"):
        arguments = (absmax.float(), state.code, state.blocksize, state.shape, state.dtype)
        results = [_dequantize_4bit_compute(packed.reshape(-1), *arguments).double()]
        if state.shape[-1] % state.blocksize == 0:
            results.append(F.dequantize_4bit(packed, state).double())
    return results


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(3, 70) | st.sampled_from([32, 64, 128]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_bitsandbytes_on_4_bit(
    rows: int, columns: int, quant_type: str, blocksize: int, nested: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = drawn(seed, rows, columns).to(dtype)
    packed, state = F.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
    absmax = state.absmax
    if nested:
        absmax = dequantize_absmax(absmax, state.state2.code, state.state2.absmax, 256, state.offset)
    ours = dequantize_blockwise4(packed, absmax, TABLES[quant_type], blocksize, weight.shape)
    assert ours.dtype == torch.float64
    assert ours.shape == weight.shape
    # Half the widest gap of either table is a sixth; double quantization keeps seven bits of a scale.
    assert (ours - weight.double()).abs().max() <= (1 / 6 + 1 / 64) * weight.abs().max()
    for theirs in dequantized_by_bitsandbytes(packed, absmax, state):
        assert bool(((ours - theirs).abs() <= rounding_bound(ours, state)).all())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_agrees_with_bitsandbytes_on_int8(rows: int, columns: int, seed: int) -> None:
    packed, scales, _ = F.int8_vectorwise_quant(drawn(seed, rows, columns).half())
    ours = dequantize_int8(packed, scales)
    theirs = F.int8_vectorwise_dequant(packed, scales).double()
    assert bool(((ours - theirs).abs() <= 3 * U32 * ours.abs()).all())


def four_bit(size_in: int, size_out: int, **options: Any) -> tuple[Any, torch.Tensor]:
    layer = bnb.nn.Linear4bit(size_in, size_out, bias=False, **options)
    weight = drawn(3, size_out, size_in)
    layer.weight.data = weight.clone()
    return layer.to("cpu"), weight


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reads_a_layer_in_every_storage_dtype(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    options = {"quant_type": quant_type, "compress_statistics": nested}
    layer, weight = four_bit(64, 48, quant_storage=storage, **options)
    plain, _ = four_bit(64, 48, **options)
    assert layer.weight.dtype == storage
    got = dequantized_weight(layer)
    assert torch.equal(got, dequantized_weight(plain))
    state = layer.weight.quant_state
    theirs = F.dequantize_4bit(layer.weight.data, state).double()
    assert bool(((got - theirs).abs() <= rounding_bound(got, state)).all())
    assert (got - weight).abs().mean() < 0.15


def test_reads_a_layer_of_odd_size() -> None:
    layer, weight = four_bit(9, 7, quant_type="nf4")
    assert dequantized_weight(layer).shape == (7, 9)
    assert (dequantized_weight(layer) - weight).abs().mean() < 0.15


def test_reads_state_that_only_the_layer_kept() -> None:
    layer, _ = four_bit(64, 32)
    expected = dequantized_weight(layer)
    layer.quant_state, layer.weight.quant_state = layer.weight.quant_state, None
    assert torch.equal(dequantized_weight(layer), expected)


def test_reads_the_layout_that_bitsandbytes_repacks_to_in_eval() -> None:
    layer, _ = four_bit(128, 64, quant_type="nf4", compress_statistics=False)
    expected = dequantized_weight(layer)
    scales = layer.weight.quant_state.absmax
    layer.weight.data, state = F._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    ratio = scales.bfloat16().double() / scales.double()  # the layout keeps its scales in bfloat16
    assert state.packing_format_for_cpu
    torch.testing.assert_close(
        dequantized_weight(layer), expected * ratio.reshape(64, 2).repeat_interleave(64, dim=1), rtol=1e-14, atol=0
    )


def test_reads_int8_before_and_after_a_forward() -> None:
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    weight = drawn(5, 32, 64).half()
    layer.weight.data = weight.clone()
    layer = layer.to("cpu")
    before = dequantized_weight(layer)
    assert layer.weight.SCB is not None
    layer(torch.ones(1, 64, dtype=torch.float16))
    assert layer.weight.SCB is None
    assert torch.equal(dequantized_weight(layer), before)
    step = weight.abs().amax(dim=1, keepdim=True).double() / 127
    assert bool(((before - weight.double()).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8"])
def test_a_layers_output_is_that_of_its_float_weight(load: Any, quantization: str) -> None:
    options = {} if quantization == "int8" else {"bnb_4bit_compute_dtype": torch.float32}
    layer = load("gpt2", quantization, torch.float32, **options).transformer.h[0].mlp.c_fc.train()
    layer.bias.data = layer.bias.data.float()
    x = drawn(7, 4, 64).requires_grad_(True)
    expected = x.detach().double() @ dequantized_weight(layer).T + layer.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=64 * 8 * U32 * float(expected.abs().max()))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.ReLU(), bnb.nn.Linear8bitLt(2, 2, has_fp16_weights=True)])
def test_refuses_what_is_not_quantized(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=type(layer).__name__):
        dequantized_weight(layer)


def test_refuses_layers_of_other_backends() -> None:
    with pytest.raises(TypeError, match="HQQLinear"):
        dequantized_weight(type("HQQLinear", (nn.Linear,), {"__module__": "hqq.core"})(2, 2))
