"""HQQ's weights: the format, the package's own backward, and layers as its own quantizer leaves them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kbitcheck_reference import dequantized_weight
from kbitcheck_reference.formats import hqq as oracle
from torch import nn

from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.probes.snapshot import snapshot
from tests.backends.products import assert_backward_is_the_product
from tests.shallow import shallow

BACKEND = registry.of_scheme("hqq-int4")
WHY = BACKEND.not_on_load()
installed = pytest.mark.skipif(bool(WHY), reason=WHY or "installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def config(bits: int, group: int | None, axis: int = 1, **more: Any) -> dict[str, Any]:
    weights = {
        "nbits": bits, "channel_wise": True, "group_size": group, "optimize": False, "round_zero": bits == 4, "axis": axis,
        "view_as_float": False, **more,
    }  # fmt: skip
    return {
        "weight_quant_params": weights,
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def quantized(weight: torch.Tensor, settings: dict[str, Any], *, bias: bool = False) -> Any:
    """The package's own layer of a weight."""
    from hqq.core.quantize import HQQLinear

    backends.load()
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    dense.weight.data = weight.clone()
    return HQQLinear(dense, quant_config=settings, compute_dtype=weight.dtype, device="cpu")


def test_golden_slices() -> None:
    halves = torch.tensor([[0x4F, 0x20]], dtype=torch.uint8)
    assert oracle.unpack_slices(halves, 4).tolist() == [[4, 2], [15, 0]]
    assert oracle.unpack_slices(torch.tensor([[0b11100100]], dtype=torch.uint8), 2).flatten().tolist() == [3, 2, 1, 0]
    assert oracle.unpack_slices(torch.tensor([[0b10000001]], dtype=torch.uint8), 1).flatten().tolist() == [1] + [
        0
    ] * 6 + [1]
    word = sum(code << 3 * (9 - place) for place, code in enumerate([7, 6, 5, 4, 3, 2, 1, 0, 1, 2]))
    codes = oracle.unpack_slices(torch.tensor([[word]], dtype=torch.int32), 3)
    assert codes.flatten().tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 1, 2]


def test_golden_vectors() -> None:
    codes = torch.tensor([[0, 15], [8, 1]])
    rows = oracle.dequantize(codes, torch.tensor([[0.5], [2.0]]), torch.tensor([[8.0], [0.5]]))
    assert rows.tolist() == [[-4.0, 3.5], [15.0, 1.0]]
    columns = oracle.dequantize(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[8.0, 0.5]]))
    assert columns.tolist() == [[-4.0, 29.0], [0.0, 1.0]]


def test_numbers_are_those_of_the_scales_dtype() -> None:
    scale, zero = torch.tensor([[1.5]]).bfloat16(), torch.tensor([[1 / 256]]).bfloat16()
    # 15 - 2^-8 is 15 in bfloat16, whose numbers are 2^-4 apart there.
    assert oracle.dequantize(torch.tensor([[15]]), scale, zero).tolist() == [[22.5]]


def test_packing_puts_a_group_s_ends_at_its_first_and_last_code() -> None:
    weight = torch.tensor([[-4.0, 3.5, 0.0, 1.0], [8.0, 38.0, 10.0, 12.0]])
    packed = oracle.pack(weight, "hqq-int4", 4)
    assert packed["scale"].tolist() == [[0.5], [2.0]]
    assert packed["zero"].tolist() == [[8.0], [-4.0]]
    assert oracle.unpack_slices(packed["W_q"], 4).tolist() == [[0, 15, 8, 10], [0, 15, 1, 2]]
    with pytest.raises(ValueError, match="2 equal slices"):
        oracle.pack(weight[:1], "hqq-int4", 4)
    with pytest.raises(ValueError, match="no whole groups of 3"):
        oracle.pack(weight, "hqq-int4", 3)


@pytest.mark.skipif("not installed" not in WHY, reason="asks what is said without hqq, which is installed")
def test_without_it_a_model_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"hqq is not installed: pip install 'kbitcheck\[hqq\]'"):
        shallow("tiny:llama").load(Quantization.parse("hqq-int4"))


def test_other_widths_are_of_checkpoints_alone() -> None:
    assert "hqq-int8" not in registry.run_here()
    with pytest.raises(UsageError, match=r"hqq is not installed|to 4 bits alone"):
        shallow("tiny:llama").load(Quantization.parse("hqq-int8"))


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64, "dtype": "bfloat16",
}  # fmt: skip


Checkpoint = Callable[[dict[str, Any], list[str]], dict[str, int]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Bytes of the tensors of a checkpoint with these settings that skips these modules, by name."""

    def opened(own: dict[str, Any], skip: list[str]) -> dict[str, int]:
        described = {"quant_method": "hqq", "quant_config": own, "skip_modules": skip}
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**LLAMA, "quantization_config": described}))
        source = resolve(str(path), static="always")
        model = source.meta(Quantization.parse(str(source.quant)))
        parts = [*model.named_parameters(), *model.named_buffers()]
        return {name.removeprefix("model.layers."): tensor.nbytes for name, tensor in parts}

    return opened


def test_checkpoints_of_every_width_have_their_own_sizes(checkpoint: Checkpoint) -> None:
    numbers, rows, columns = 192 * 128, 192, 128
    for bits, group, axis, codes, scales in (
        (8, 64, 1, numbers, numbers // 64), (4, 64, 1, numbers // 2, numbers // 64), (4, None, 1, numbers // 2, rows),
        (4, 64, 0, numbers // 2, numbers // 64), (2, 16, 1, numbers // 4, numbers // 16), (1, 32, 1, numbers // 8, numbers // 32),
        # 384 rows of groups are 39 words of ten, the last of which has four.
        (3, 64, 1, 39 * 64 * 4, numbers // 64), (3, 64, 0, 7 * numbers // 64 * 4, numbers // 64), (8, None, 0, numbers, columns),
    ):  # fmt: skip
        sizes = checkpoint(config(bits, group, axis), ["lm_head"])
        own = {n: size for n, size in sizes.items() if n.startswith("0.mlp.up_proj")}
        assert sorted(own.values()) == sorted([codes, 2 * scales, 2 * scales]), (bits, group, axis)
        assert sizes["lm_head.weight"] == 64 * 128 * 2


def test_bytes_under_a_floating_dtype_s_name_are_as_many(checkpoint: Checkpoint) -> None:
    assert checkpoint(config(4, 64, view_as_float=True), []) == checkpoint(config(4, 64), [])


def test_layers_that_a_configuration_does_not_name_stay(checkpoint: Checkpoint) -> None:
    sizes = checkpoint({"self_attn.q_proj": config(4, 64), "mlp.down_proj": config(2, 32)}, ["lm_head"])
    assert sizes["1.self_attn.q_proj.weight"] == 128 * 128 // 2
    assert sizes["1.mlp.down_proj.weight"] == 192 * 128 // 4
    assert sizes["1.self_attn.k_proj.weight"] == 64 * 128 * 2
    assert sizes["lm_head.weight"] == 64 * 128 * 2


@installed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_the_format_is_the_package_s(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, columns, group, axis in ((32, 64, 16, 1), (24, 40, None, 1), (16, 48, 32, 0), (20, 36, 5 * 16, 1)):
        slices = oracle.SLICES[bits]
        size = group or columns
        if bits != 3 and (rows * columns // size if axis else size) % slices:
            continue
        weight = torch.randn(rows, columns, dtype=dtype)
        layer = quantized(weight, config(bits, group, axis))
        assert dequantized_weight(layer).to(dtype).equal(layer.dequantize()), (rows, columns)
        packed = oracle.pack(weight, f"hqq-int{bits}", group, axis=axis)
        own = {"W_q": layer.W_q, "scale": layer.meta["scale"], "zero": layer.meta["zero"]}
        assert all(own[name].equal(tensor) for name, tensor in packed.items()), (rows, columns)
        assert backends.recognition(layer).scheme(layer) == f"hqq-int{bits}"


@installed
def test_bytes_under_a_floating_dtype_s_name_are_read() -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    plain, hidden = (quantized(weight, config(4, 16, view_as_float=hides)) for hides in (False, True))
    assert hidden.W_q.dtype == torch.bfloat16
    assert dequantized_weight(hidden).equal(dequantized_weight(plain))
    backends.recognition(hidden).corrupt(hidden, "code")
    assert not dequantized_weight(hidden).equal(dequantized_weight(plain))


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_is_the_product_with_the_oracle_s_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = quantized(torch.randn(32, 64, dtype=dtype), config(4, 16), bias=True)
    assert_backward_is_the_product(layer, dtype)


@installed
def test_a_copy_is_a_weight_of_its_own() -> None:
    layer = quantized(torch.randn(32, 64), config(4, 16))
    copied = copy.deepcopy(layer)
    before = dequantized_weight(layer)
    backends.recognition(copied).corrupt(copied, "scale")
    assert dequantized_weight(layer).equal(before)
    assert not dequantized_weight(copied).equal(before)


@installed
def test_groups_fit_into_layers_that_are_smaller_than_them() -> None:
    model = shallow("tiny:llama").load(Quantization.parse("hqq-int4"))
    sizes = {layer.meta["group_size"] for _, layer in backends.quantized_layers(model)}  # type: ignore[index]
    assert sizes == {8}  # 108 × 108 numbers are 1458 groups of 8, and an odd number of groups of 16
    facts = snapshot(model)
    assert all({"scale", "zero", "group_size"} <= layer.state.keys() for layer in facts.layers.values())
    with pytest.raises(UsageError, match="no even count of groups of 8"):
        BACKEND.quantize(nn.Sequential(nn.Linear(5, 5)), Quantization.parse("hqq-int4"), ())


@installed
def test_a_checkpoint_s_layout_is_what_the_package_leaves(checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(128, 192, bias=False, dtype=torch.bfloat16)
    for bits, group, axis in (
        (8, 64, 1),
        (4, 64, 1),
        (4, None, 1),
        (4, 64, 0),
        (3, 64, 1),
        (3, 64, 0),
        (2, 16, 1),
        (1, 32, 1),
    ):
        layer = quantized(dense.weight.detach(), config(bits, group, axis))
        real = sorted(t.nbytes for t in (layer.W_q, layer.meta["scale"], layer.meta["zero"]))
        sizes = checkpoint(config(bits, group, axis), ["lm_head"])
        assert sorted(s for n, s in sizes.items() if n.startswith("0.mlp.up_proj")) == real, (bits, group, axis)
