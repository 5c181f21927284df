"""optimum-quanto's weights: the formats, the library's own backward, and the dtypes around layers that take one alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kbitcheck_reference import dequantized_weight
from kbitcheck_reference import prepare_model_for_kbit_training as reference
from kbitcheck_reference.formats import quanto as oracle
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe import loaded
from tests.backends.products import assert_backward_is_the_product
from tests.shallow import shallow

BACKEND = registry.of_scheme("quanto-int8")
WHY = BACKEND.unavailable()
needs_quanto = pytest.mark.skipif(bool(WHY), reason=WHY or "installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows and columns: whole groups, one group a row, rows that fill no tile, an odd number of rows, groups of 32.
SIZES = ((64, 384), (80, 256), (64, 108), (33, 20), (50, 160))


def quantized(rows: int, columns: int, dtype: torch.dtype, kind: str, *, bias: bool = True) -> tuple[torch.Tensor, Any]:
    """A weight and optimum-quanto's own layer of it."""
    from optimum.quanto import QLinear

    backends.load()
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, dtype=dtype, bias=bias)
    weight = dense.weight.detach().clone()
    layer: Any = QLinear.from_module(dense, weights=kind)
    layer.freeze()
    return weight, layer.requires_grad_(False)


def test_golden_vectors() -> None:
    codes = torch.tensor([[-128, 0, 127], [1, -1, 64]], dtype=torch.int8)
    rows = oracle.dequantize_int8(codes, torch.tensor([[0.5], [0.25]]))
    assert rows.tolist() == [[-64.0, 0.0, 63.5], [0.25, -0.25, 16.0]]
    packed = torch.tensor([[0x4F, 0x20], [0x03, 0xF1]], dtype=torch.uint8)  # rows 0 and 1 low, rows 2 and 3 high
    unpacked = oracle.unpack_halves(packed, 3)
    assert unpacked.tolist() == [[15, 0], [3, 1], [4, 2]]
    scale, shift = torch.tensor([[0.5], [2.0], [1.0]]), torch.tensor([[1.0], [-3.0], [0.25]])
    assert oracle.dequantize_int4(unpacked, scale, shift).tolist() == [[6.5, -1.0], [9.0, 5.0], [3.75, 1.75]]
    zeros = torch.tensor([[15], [0], [1]], dtype=torch.uint8)
    assert oracle.dequantize_int4(unpacked, scale, zeros).tolist() == [[0.0, -7.5], [6.0, 2.0], [3.0, 1.0]]


def test_numbers_are_those_of_the_scales_dtype() -> None:
    scale, shift = torch.tensor([[1 + 2**-7]]).bfloat16(), torch.tensor([[1.0]]).bfloat16()
    # 15 * (1 + 2^-7) = 15.117... is 15.125 in bfloat16, whose numbers are 2^-4 apart there.
    assert oracle.dequantize_int4(torch.tensor([[15]]), scale, shift).tolist() == [[14.125]]


@pytest.mark.parametrize("lanes", [32, 16, 0])
def test_tiles_of_rows(lanes: int) -> None:
    rows, columns = 80, 3
    codes = torch.arange(rows * columns, dtype=torch.uint8).view(rows, columns) % 16
    packed: list[int] = []
    tile = 2 * lanes or 32
    for start in range(0, rows, tile):
        block = codes[start : start + tile]
        whole = lanes and len(block) == tile
        for column in block.T.tolist():
            pairs = (
                zip(column[:lanes], column[lanes:], strict=True)
                if whole
                else zip(column[::2], column[1::2], strict=True)
            )
            packed += [low | high << 4 for low, high in pairs]
    assert oracle.unpack_tiles(torch.tensor(packed, dtype=torch.uint8), rows, columns, lanes).equal(codes)


def test_packing_puts_a_group_s_ends_at_its_first_and_last_code() -> None:
    weight = torch.tensor([[1.0, -0.5, 2.5, 0.0], [4.0, 4.0, -11.0, 0.0]])
    packed = oracle.pack(weight, "quanto-int4")
    assert packed["_scale"].tolist() == [[0.2], [1.0]] or packed["_scale"].allclose(torch.tensor([[0.2], [1.0]]))
    assert packed["_shift"].tolist() == [[0.5], [11.0]]
    assert oracle.unpack_halves(packed["_data"], 2)[1].tolist() == [15, 15, 0, 11]
    whole = oracle.pack(torch.tensor([[-127.0, 1.0], [0.5, 63.5]]), "quanto-int8")
    assert whole["_data"].tolist() == [[-127, 1], [1, 127]]
    assert whole["_scale"].tolist() == [[1.0], [0.5]]


@pytest.mark.skipif("not installed" not in WHY, reason="asks what is said without optimum-quanto, which is installed")
def test_without_it_a_model_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"optimum-quanto is not installed: pip install 'kbitcheck\[quanto\]'"):
        resolve("tiny:llama").load(Quantization.parse("quanto-int8"))


def test_what_is_not_supported_is_refused() -> None:
    for described in ({"weights": "int2"}, {"weights": "int8", "activations": "int8"}):
        with pytest.raises(UsageError, match="int8 or int4 alone"):
            BACKEND.described(described)
    assert BACKEND.described({"weights": "int4", "modules_to_not_convert": ["lm_head"]}) == (
        "quanto-int4",
        {},
        ("lm_head",),
    )


@needs_quanto
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["qint8", "qint4"])
def test_the_format_is_the_library_s(kind: str, dtype: torch.dtype) -> None:
    classes = set()
    for rows, columns in SIZES:
        weight, layer = quantized(rows, columns, dtype, kind)
        classes.add(type(layer.weight).__name__)
        own = layer.weight.dequantize()
        assert dequantized_weight(layer).to(dtype).equal(own), (rows, columns)
        scheme = backends.recognition(layer).scheme(layer)
        for name, tensor in oracle.pack(weight, scheme, layer.weight_group_size).items():
            if name in dir(layer.weight) and not hasattr(layer.weight, "_scale_shift"):
                part = getattr(layer.weight, name)
                assert getattr(part, "_data", part).equal(tensor), (rows, columns, name)
    assert len(classes) == (2 if (kind, dtype) == ("qint4", torch.bfloat16) else 1)


@needs_quanto
@pytest.mark.parametrize("kind", ["qint8", "qint4"])
def test_the_backward_is_the_product_with_the_oracle_s_weight(kind: str) -> None:
    for rows, columns in ((64, 256), (32, 64)):
        _, layer = quantized(rows, columns, torch.bfloat16, kind)
        assert_backward_is_the_product(layer, torch.bfloat16)


@needs_quanto
@pytest.mark.parametrize("kind", ["qint8", "qint4"])
def test_a_copy_is_a_weight_of_its_own(kind: str) -> None:
    _, layer = quantized(64, 256, torch.bfloat16, kind)
    copied = copy.deepcopy(layer)
    assert type(copied.weight) is type(layer.weight)
    assert isinstance(copied.weight, nn.Parameter)
    before = dequantized_weight(layer)
    backends.recognition(copied).corrupt(copied, "scale")
    assert dequantized_weight(layer).equal(before)
    assert not dequantized_weight(copied).equal(before)


@needs_quanto
def test_a_zero_point_that_is_off_by_one_code_is_another_state() -> None:
    from kbitcheck.observe.probes.snapshot import layer as facts_of

    _, layer = quantized(32, 64, torch.float32, "qint4")
    before = facts_of("", layer)
    layer.weight._shift[0] += layer.weight._scale[0]
    after = facts_of("", layer)
    assert before.state["shift"] != after.state["shift"]
    assert before.dequantized != after.dequantized


@needs_quanto
def test_columns_that_torch_s_product_cannot_read_do_not_end_the_process() -> None:
    model = shallow("tiny:llama").load(Quantization.parse("quanto-int8"))  # 108 columns in bfloat16
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long)).logits).all()


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "source_of", lambda spec: shallow(spec.model))


def failing(prepare: Any, model: str, quant: str, codes: list[str]) -> set[str]:
    report = kbitcheck.check_implementation(
        prepare, models=[model], quants=[quant], checkpointing=["off"], select=codes
    )
    return {r.rule for r in report.results if r.status.value == "FAIL"}


def cast(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
    """Casts what is not packed, biases of packed layers too, as is right for other quantizers."""
    reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for parameter in model.parameters():
        if not backends.is_packed(parameter):
            parameter.data = parameter.data.float()
    return model


@needs_quanto
@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize(("model", "quant"), [("tiny:llama", "quanto-int4"), ("tiny:opt", "quanto-int8")])
def test_a_cast_around_layers_that_take_one_dtype_is_caught_where_it_runs(model: str, quant: str) -> None:
    """int4 layers refuse float32 inputs; int8 layers take them, and have no backward with a float32 bias."""
    assert failing(cast, model, quant, ["KB210"]) == {"KB210"}


@needs_quanto
@pytest.mark.usefixtures("_few")
def test_peft_s_function_is_at_fault() -> None:
    report = kbitcheck.check_implementation(
        "peft", models=["tiny:llama"], quants=["quanto-int8"], checkpointing=["off"], select=["KB502", "KB506"]
    )
    assert {(r.rule, r.status.value) for r in report.results} == {("KB502", "FAIL"), ("KB506", "FAIL")}
    assert all("cannot be changed" in str(r.failures) for r in report.results)
