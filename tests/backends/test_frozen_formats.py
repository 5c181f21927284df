"""GPTQ, AWQ and AQLM: golden vectors of the published layouts, and packing that unpacks to what it packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training
from kbitcheck_reference.bit_stream import from_words, to_words
from kbitcheck_reference.formats import aqlm, awq, gptq


def test_gptq_golden_vectors() -> None:
    # Column i of the weight has code i in row 0 and code 15 in rows 1 to 7; scales 0.5 and 2, zeros 8 and 1, each less one.
    qweight = torch.tensor([[0x76543210, *[-1] * 7]], dtype=torch.int32)
    qzeros = torch.tensor([[0x77777777], [0]], dtype=torch.int32)
    scales = torch.tensor([[0.5] * 8, [2.0] * 8]).half()
    weight = gptq.dequantize(qweight, qzeros, scales, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert weight[0].tolist() == [-4.0, -3.5, -3.0, -2.5, 6.0, 8.0, 10.0, 12.0]
    assert weight[1].tolist() == [3.5] * 4 + [28.0] * 4
    ordered = gptq.dequantize(qweight, qzeros, scales, torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]))
    assert ordered[0].tolist() == [-2.0, -3.5, 2.0, -2.5, 6.0, -1.5, 10.0, -0.5]
    later = gptq.dequantize(qweight, qzeros, scales, torch.zeros(8), version=2)
    assert later[0].tolist() == [(i - 7) / 2 for i in range(8)]


def test_a_gptq_zero_of_nothing_wraps_around() -> None:
    weight = torch.arange(16.0).repeat(8, 1)  # no negative number: the zero is code 0, stored as 15
    packed: dict[str, Any] = gptq.pack(weight, "gptq-int4", 16, symmetric=False)
    assert packed["qzeros"].tolist() == [[-1]]
    assert gptq.dequantize(**packed).equal(weight.double())


@pytest.mark.parametrize("scheme", gptq.BITS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("acts", [False, True])
def test_gptq_packing_is_right_to_the_byte(scheme: str, version: int, acts: bool) -> None:
    torch.manual_seed(0)
    bits = gptq.BITS[scheme]
    most = 2**bits - 1
    for rows, columns, group in ((32, 64, 32), (64, 96, None), (32, 128, 16)):
        size = group or columns
        order = torch.randperm(columns) if acts else torch.arange(columns)
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = torch.arange(columns, dtype=torch.int32) // size
        codes, zeros = torch.randint(0, most + 1, (rows, columns)), torch.randint(0, most + 1, (columns // size, rows))
        for first in range(0, columns, size):  # each group reaches both ends
            codes[:, order[first]], codes[:, order[first + 1]] = 0, most
        scales = (2.0 ** torch.randint(-6, 0, zeros.shape)).half()
        of_column = g_idx.long()
        weight = (codes - zeros[of_column].T) * scales[of_column].T.float()
        packed: dict[str, Any] = gptq.pack(
            weight, scheme, group, symmetric=False, order=order if acts else None, version=version
        )
        assert packed["qweight"].equal(to_words(codes, bits).T)
        assert packed["qzeros"].equal(to_words((zeros - (2 - version)) % 2**bits, bits))
        assert packed["scales"].equal(scales)
        assert packed["g_idx"].equal(g_idx)
        assert gptq.dequantize(**packed, version=version).equal(weight.double())


@pytest.mark.parametrize("scheme", gptq.BITS)
def test_symmetric_gptq_codes_are_off_by_a_step_at_most(scheme: str) -> None:
    torch.manual_seed(0)
    bits, weight = gptq.BITS[scheme], torch.randn(32, 64)
    packed: dict[str, Any] = gptq.pack(weight, scheme, 32)
    assert from_words(packed["qzeros"], bits, 32).eq(2 ** (bits - 1) - 1).all()
    steps = packed["scales"].double()[packed["g_idx"].long()].T
    # Half a step, and at the upper end, which has no code, half a step more; the scale's rounding moves that by 2^-11 of 2^(bits - 1).
    assert ((gptq.dequantize(**packed) - weight.double()).abs() <= steps * (0.5 + 2.0 ** (bits - 12))).all()


def test_codes_that_fill_no_word_are_refused() -> None:
    with pytest.raises(ValueError, match="fill no whole words"):
        awq.pack(torch.zeros(12, 128), "awq-int4")
    with pytest.raises(ValueError, match="no whole blocks"):
        aqlm.pack(torch.zeros(4, 12), "aqlm")


def test_awq_golden_vectors() -> None:
    # From the lowest four bits on, a word has rows 0, 2, 4, 6, 1, 3, 5 and 7.
    qweight = torch.tensor([[0x76543210], [-1]], dtype=torch.int32)
    qzeros = torch.tensor([[0x11111111]], dtype=torch.int32)
    weight = awq.dequantize(qweight, qzeros, torch.tensor([[0.5] * 8]).half())
    assert weight[:, 0].tolist() == [(code - 1) / 2 for code in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert weight[:, 1].tolist() == [7.0] * 8


def test_awq_packing_round_trips() -> None:
    torch.manual_seed(0)
    for rows, columns, group in ((32, 128, 128), (8, 64, 16), (16, 48, None)):
        weight = torch.randn(rows, columns)
        packed: dict[str, Any] = awq.pack(weight, "awq-int4", group)
        assert packed["qweight"].shape == (columns, rows // 8)
        steps = packed["scales"].double().repeat_interleave(group or columns, dim=0).T
        # A code and a zero are each rounded; so is the scale, by 2^-11, over 15 steps.
        assert ((awq.dequantize(**packed) - weight.double()).abs() <= steps * (1.0 + 15 * 2**-11)).all()
    exact = torch.arange(-7.0, 9.0).repeat(8, 1)
    packed = awq.pack(exact, "awq-int4", 16)
    assert awq.dequantize(**packed).equal(exact.double())


def test_aqlm_golden_vectors() -> None:
    books = torch.zeros(2, 256, 1, 2)
    books[0, 1, 0], books[0, 255, 0], books[1, 128, 0] = (
        torch.tensor([1.0, 2.0]),
        torch.tensor([-3.0, 5.0]),
        torch.tensor([0.5, 0.25]),
    )
    codes = torch.tensor([[[1, 0], [-1, -128]]], dtype=torch.int8)
    weight = aqlm.dequantize(codes, books, torch.full((1, 1, 1, 1), 2.0))
    assert weight.tolist() == [[2.0, 4.0, -5.0, 10.5]]


def test_aqlm_blocks_of_several_rows_keep_their_places() -> None:
    weight = torch.arange(16.0).view(4, 4) / 16
    packed: dict[str, Any] = aqlm.pack(weight, "aqlm", columns=2, rows=2, codebooks=1, bits=4)
    assert packed["codes"].shape == (2, 2, 1)
    # Four blocks are their own vectors; numbers and scales are float16's.
    torch.testing.assert_close(aqlm.dequantize(**packed), weight.double(), rtol=2**-10, atol=0)


def test_each_format_knows_its_layers_and_no_other_s() -> None:
    weight = torch.randn(32, 128)
    layers = {}
    for form, scheme in ((gptq, "gptq-int4"), (awq, "awq-int4"), (aqlm, "aqlm")):
        layer = torch.nn.Module()
        for name, tensor in form.pack(weight, scheme).items():
            layer.register_buffer(name, tensor)
        layers[form] = layer
    assert {f: [g for g in layers if g.holds(layers[f])] for f in layers} == {f: [f] for f in layers}
    for form, layer in layers.items():
        assert form.unpack(layer).shape == weight.shape


def test_scales_that_are_parameters_are_not_cast() -> None:
    layer: Any = type("QuantizedLinear", (torch.nn.Module,), {"__module__": "aqlm.inference"})()
    for name, tensor in aqlm.pack(torch.randn(32, 128), "aqlm").items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    model = torch.nn.ModuleDict({"packed": layer, "norm": torch.nn.LayerNorm(4).half()})
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert aqlm.holds(layer)
    assert (layer.scales.dtype, layer.codebooks.dtype) == (torch.float16, torch.float16)
    assert model["norm"].weight.dtype == torch.float16  # such a layer takes one dtype
