"""compressed-tensors' weights: the packed format to the byte, and layers as the library's first forward leaves them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kbitcheck_reference import bit_stream, prepare_model_for_kbit_training
from kbitcheck_reference.formats import compressed_tensors as oracle
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.judge.conditions import settle
from tests.shallow import shallow

BACKEND = registry.of_scheme("compressed-tensors-int4")
WHY = BACKEND.not_on_load()
installed = pytest.mark.skipif(bool(WHY), reason=WHY or "installed")
# Rows, columns, and columns that share a scale.
SIZES = ((33, 108, None), (64, 128, 32), (20, 256, 128))


def settings(scheme: str, group: int | None, *, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": oracle.BITS[scheme], "type": "int", "symmetric": symmetric, **strategy}


def holder(tensors: dict[str, torch.Tensor], scheme: str, status: str = "compressed") -> Any:
    layer: Any = nn.Linear(1, 1)
    del layer.weight
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    weights = SimpleNamespace(num_bits=oracle.BITS[scheme], block_structure=None)
    layer.quantization_scheme, layer.quantization_status = SimpleNamespace(weights=weights), status
    return layer


def test_golden_stream_of_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7, 5]])
    # Three bits each from the lowest on: the eleventh code has two bits in the first word and one in the second.
    low = sum(code << 3 * i for i, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0, 1, 2])) + (3 << 30)
    words = bit_stream.to_words(codes, 3)
    assert words.tolist() == [[low - 2**32, 1 + (5 << 1)]]
    assert bit_stream.from_words(words, 3, 12).equal(codes)
    assert bit_stream.to_words(torch.arange(8).unsqueeze(0), 4).tolist() == [[0x76543210]]


def test_golden_vectors() -> None:
    words = torch.tensor([[0x76543210], [-1]], dtype=torch.int32)
    codes = oracle.unpack_codes(words, 4, 8)
    assert codes.tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1], [7] * 8]
    scale = torch.tensor([[0.5, 2.0], [1.0, 4.0]])
    assert oracle.dequantize(codes, scale).tolist() == [
        [-4.0, -3.5, -3.0, -2.5, -8.0, -6.0, -4.0, -2.0],
        [7.0, 7.0, 7.0, 7.0, 28.0, 28.0, 28.0, 28.0],
    ]
    zero = torch.tensor([[-8, 0], [7, 7]])
    assert oracle.dequantize(codes, scale, zero)[:, ::4].tolist() == [[0.0, -8.0], [0.0, 0.0]]
    assert oracle.dequantize(codes, torch.tensor([2.0]))[0, :2].tolist() == [-16.0, -14.0]
    blocks = oracle.dequantize(codes, torch.tensor([[1.0, 3.0]]), block=(2, 5))
    assert blocks[0].tolist() == [-8.0, -7.0, -6.0, -5.0, -4.0, -9.0, -6.0, -3.0]


def test_numbers_are_those_of_the_scales_dtype() -> None:
    scale = torch.tensor([[1 + 2**-7]]).bfloat16()
    # 7 * (1 + 2^-7) = 7.0546875; bfloat16's numbers are 2^-5 apart there.
    assert oracle.dequantize(torch.tensor([[7]]), scale).tolist() == [[7.0625]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", oracle.BITS)
def test_packing_is_off_by_half_a_step_at_most(scheme: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    for rows, columns, group in SIZES:
        weight = torch.randn(rows, columns)
        packed = oracle.pack(weight, scheme, group, symmetric=symmetric)
        steps = packed["weight_scale"].repeat_interleave(group or columns, dim=1).double()
        # A symmetric group's positive end lacks half a step; a zero point that is rounded moves both ends by half a step. Quotient,
        # sum and product are each rounded to float32's 2^-24 of at most 2^bits codes, and the scale that bounds the largest is too.
        bound = steps * ((0.5 if symmetric else 1.0) + 4 * 2**-24 * 2 ** oracle.BITS[scheme])
        assert ((oracle.unpack(holder(packed, scheme)) - weight.double()).abs() <= bound).all()


def test_states_that_are_not_of_a_checkpoint_hold_no_packed_weight() -> None:
    packed = oracle.pack(torch.randn(4, 8), "compressed-tensors-int4")
    assert oracle.holds(holder(packed, "compressed-tensors-int4"))
    assert not oracle.holds(holder(packed, "compressed-tensors-int4", "calibration"))
    assert not oracle.holds(nn.Linear(2, 2))


def test_what_has_no_backward_is_refused() -> None:
    for text in ("compressed-tensors-fp8", "compressed-tensors-int8-dynamic"):
        assert text not in registry.run_here()
        with pytest.raises(UsageError, match=r"compressed-tensors is not installed|no backward"):
            shallow("tiny:llama").load(Quantization.parse(text))


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", oracle.BITS)
def test_the_format_is_the_library_s(scheme: str, symmetric: bool, dtype: torch.dtype) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    torch.manual_seed(0)
    library: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    for rows, columns, group in SIZES:
        weight = torch.randn(rows, columns, dtype=dtype)
        packed = oracle.pack(weight, scheme, group, symmetric=symmetric)
        how = QuantizationScheme(targets=["Linear"], weights=settings(scheme, group, symmetric=symmetric))
        state = {"weight": weight, "weight_scale": packed["weight_scale"]}
        if not symmetric:
            zero = oracle.unpack_codes(packed["weight_zero_point"].T, oracle.BITS[scheme], rows).T
            state["weight_zero_point"] = zero.to(torch.int8).contiguous()
        own = library.compress(state, how)
        assert own.keys() == packed.keys()
        assert all(own[name].equal(tensor) for name, tensor in packed.items())
        assert library.decompress(packed, how)["weight"].double().equal(oracle.unpack(holder(packed, scheme)))


@installed
def test_a_checkpoint_is_unpacked_by_its_first_forward_as_here(tmp_path: Any) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoModelForCausalLM

    here: Any = shallow("tiny:llama").load(Quantization.parse("compressed-tensors-int4"))
    compressor = ModelCompressor.from_pretrained_model(here)
    name, layer = next(backends.quantized_layers(here))
    before = layer.weight.clone()  # type: ignore[operator]
    compressor.compress_model(here)
    here.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    packed = loaded.get_submodule(name)
    assert backends.recognition(packed).packed(packed).dtype == torch.int32
    small = sum(p.nbytes for p in loaded.parameters())
    loaded(torch.ones(1, 4, dtype=torch.long))
    assert packed.weight.equal(before)
    assert backends.recognition(packed).state(packed).keys() == backends.recognition(layer).state(layer).keys()
    assert sum(p.nbytes for p in loaded.parameters()) > 2 * small


@installed
def test_what_a_forward_unpacks_is_told_and_no_fault_of_a_preparation() -> None:
    judged = kbitcheck.check_implementation(
        prepare_model_for_kbit_training, models=["tiny:llama"], quants=["compressed-tensors-int4"], checkpointing=["off"],
        strict=True, select=["KB902", "KB912"],
    )  # fmt: skip
    cost, told = judged.results
    assert (cost.status.value, told.status.value) == ("SKIP", "FAIL")
    assert (told.failures[0].party.value, told.failures[0].expected) == ("model", "compressed-tensors-int4")
    assert not judged.counts(told)
    spec = CaseSpec(model="tiny:llama", quant="compressed-tensors-int4", implementation="reference")
    assert settle(told, spec, {}, BACKEND.findings()).finding
    assert not settle(
        told, replace(spec, implementation="peft"), {}, BACKEND.findings()
    ).finding  # as of `kbitcheck model`
