"""GPTQModel's plain layer of AWQ: its arithmetic is the format's, and what is packed here is what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference import dequantized_weight
from kbitcheck_reference import prepare_model_for_kbit_training as reference
from kbitcheck_reference.formats import awq as oracle
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.run.suites import EIGHTS, QUICK, RECIPES, cases
from tests.backends.products import assert_backward_is_the_product
from tests.shallow import shallow

BACKEND = registry.of_scheme("awq-int4")
WHY = BACKEND.not_on_load()
installed = pytest.mark.skipif(bool(WHY), reason=WHY or "installed")


def quantized(
    rows: int, columns: int, text: str = "awq-int4,group=32", *, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> tuple[torch.Tensor, Any]:
    """A weight and the library's layer of it."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(columns, rows, bias=bias, dtype=dtype))
    model.config = type("Config", (), {})()
    weight = model[0].weight.detach().clone()
    BACKEND.quantize(model, Quantization.parse(text), ())
    return weight, model[0]


@pytest.mark.skipif("not installed" not in WHY, reason="asks what is said without gptqmodel, which is installed")
def test_without_it_a_model_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"gptqmodel is not installed: pip install 'kbitcheck\[awq\]'"):
        shallow("tiny:opt").load(Quantization.parse("awq-int4"))


def test_recipes_of_which_each_layer_fits_are_known() -> None:
    rows = {
        f"tiny:{name}": [
            backends.recognition(layer).shape(layer)[0]
            for _, layer in backends.quantized_layers(resolve(f"tiny:{name}").meta(Quantization.parse("nf4")))
        ]
        for name in RECIPES
    }
    assert {name for name, each in rows.items() if all(n % 8 == 0 for n in each)} == set(EIGHTS)
    specs = cases(QUICK, quants=["nf4", "awq-int4"], checkpointing=["off"], implementation="reference")
    assert {spec.model for spec in specs if spec.quant == "awq-int4"} == set(EIGHTS)
    assert {spec.model for spec in specs if spec.quant == "nf4"} == {model for model, _, _ in QUICK}


@installed
def test_a_model_of_which_no_layer_fits_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="of none is the number of outputs a multiple of 8"):
        shallow("tiny:llama").load(Quantization.parse("awq-int4"))


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", ["awq-int4", "awq-int4,group=32", "awq-int4,group=all"])
def test_the_format_is_the_library_s(text: str, dtype: torch.dtype) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    for rows, columns in ((64, 256), (40, 108), (8, 96)):
        weight, layer = quantized(rows, columns, text, dtype=dtype)
        assert layer.scales.dtype == (torch.float16 if dtype == torch.float32 else dtype)
        own = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
        exact = dequantized_weight(layer)
        assert exact.to(own.dtype).equal(own.T), (rows, columns)
        assert backends.arithmetic(layer).unpacked(layer).equal(own.T)
        assert (exact - weight.double()).norm() < 0.2 * weight.double().norm()


@installed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_backward_is_the_product_with_the_oracle_s_weight(dtype: torch.dtype) -> None:
    _, layer = quantized(64, 128, dtype=dtype, bias=True)
    assert_backward_is_the_product(layer, dtype)


@installed
def test_an_input_in_another_dtype_changes_the_scales_for_good() -> None:
    """As docs/findings/gptqmodel_awq_float16.py shows: so nothing around such a layer may be cast."""
    _, layer = quantized(64, 128, dtype=torch.float16)
    before = dequantized_weight(layer)
    layer(torch.randn(1, 128, dtype=torch.bfloat16))
    layer(torch.randn(1, 128, dtype=torch.float16))
    assert not dequantized_weight(layer).equal(before)
    assert backends.arithmetic(layer).fixed_dtype(layer) == torch.float16
    assert oracle.FIXES_DTYPES


@installed
def test_layers_that_fill_no_words_or_groups_stay_and_a_checkpoint_says_so() -> None:
    model: Any = shallow("tiny:opt").load(Quantization.parse("awq-int4"))
    packed = dict(backends.quantized_layers(model))
    plain = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    described = model.config.quantization_config
    assert described.group_size == 32  # of 128, 64 and 32 columns the first that 96 columns fill
    assert {n.rpartition(".")[2] for n in packed} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1"}
    assert {n.rpartition(".")[2] for n in plain} == {"fc2", "lm_head"}  # fc2 has 168 columns
    assert plain <= set(described.modules_to_not_convert)


@installed
def test_what_is_saved_is_loaded_again() -> None:
    report = kbitcheck.check_implementation(
        reference, models=["tiny:opt"], quants=["awq-int4"], checkpointing=["off"], select=["KB510"]
    )
    assert [r.status.value for r in report.results] == ["PASS"]


@installed
def test_layers_between_float32_ones_are_judged() -> None:
    """PEFT's function casts what stays unquantized; a layer returns float32 to it, whatever it multiplies in."""
    peft = pytest.importorskip("peft")
    report = kbitcheck.check_implementation(
        peft.prepare_model_for_kbit_training, models=["tiny:opt"], quants=["awq-int4"], checkpointing=["off"],
        select=["KB209", "KB303", "KB304"],
    )  # fmt: skip
    assert {r.rule: r.status.value for r in report.results} == {"KB209": "PASS", "KB303": "PASS", "KB304": "PASS"}
