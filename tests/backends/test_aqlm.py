"""AQLM's own layer, where no kernel of its fits: its arithmetic is the format's, and what is packed here is what it reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kbitcheck_reference import dequantized_weight
from kbitcheck_reference import prepare_model_for_kbit_training as reference
from kbitcheck_reference.formats import aqlm as oracle
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.result import Status
from kbitcheck.judge.conditions import settle
from tests.backends.products import assert_backward_is_the_product
from tests.shallow import shallow

BACKEND = registry.of_scheme("aqlm")
WHY = BACKEND.not_on_load()
installed = pytest.mark.skipif(bool(WHY), reason=WHY or "installed")


def quantized(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, *, bias: bool = False) -> tuple[Any, Any]:
    """A weight and the library's layer of it."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(columns, rows, bias=bias, dtype=dtype))
    model.config = type("Config", (), {})()
    weight = model[0].weight.detach().clone()
    BACKEND.quantize(model, Quantization.parse("aqlm"), ())
    return weight, model[0]


@pytest.mark.skipif("not installed" not in WHY, reason="asks what is said without aqlm, which is installed")
def test_without_it_a_model_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"aqlm is not installed: pip install 'kbitcheck\[aqlm\]'"):
        shallow("tiny:llama").load(Quantization.parse("aqlm"))


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_format_is_the_library_s(dtype: torch.dtype) -> None:
    from aqlm.inference_kernels.dequantization import dequantize_gemm

    for rows, columns in ((64, 256), (36, 108), (7, 94)):
        weight, layer = quantized(rows, columns, dtype)
        eye = torch.eye(columns, dtype=dtype)
        own = dequantize_gemm(eye, layer.codes, layer.codebooks, layer.scales, None).T
        exact = dequantized_weight(layer)
        assert exact.to(dtype).equal(own), (rows, columns)
        assert backends.arithmetic(layer).unpacked(layer).equal(own)
        if (
            rows * columns // layer.in_group_size <= layer.codebook_size
        ):  # each block has a code: numbers and scales are rounded to half
            narrow = max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps)
            largest = weight.double().abs().amax(dim=1, keepdim=True)
            assert ((exact - weight.double()).abs() <= 3 * narrow * largest).all()
        assert layer.in_group_size == next(size for size in (8, 4, 2) if columns % size == 0)


@installed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_backward_is_the_product_with_the_oracle_s_weight(dtype: torch.dtype) -> None:
    _, layer = quantized(64, 128, dtype, bias=True)
    assert_backward_is_the_product(layer, dtype)


@installed
def test_a_layer_takes_one_dtype() -> None:
    _, layer = quantized(64, 128)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(9, 128))
    assert backends.arithmetic(layer).fixed_dtype(layer) == torch.bfloat16
    assert oracle.FIXES_DTYPES


@installed
def test_odd_columns_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="odd columns"):
        quantized(8, 9)


@installed
@pytest.mark.parametrize("part", ["code", "scale"])
def test_a_broken_weight_is_caught(part: str) -> None:
    def prepare(model: Any, **arguments: Any) -> Any:
        model = reference(model, **arguments)
        _, layer = next(iter(backends.quantized_layers(model)))
        backends.recognition(layer).corrupt(layer, part)
        return model

    code = {"code": "KB205", "scale": "KB206"}[part]
    report = kbitcheck.check_implementation(
        prepare, models=["tiny:llama"], quants=["aqlm"], checkpointing=["off"], select=[code]
    )
    assert [result.rule for result in report.results if report.counts(result)] == [code]


@installed
@pytest.mark.transformers5("earlier releases load such a checkpoint")
def test_a_checkpoint_of_t5_is_not_loaded_whoever_prepares_the_model() -> None:
    """In float16, whose smallest numbers its packed weights are rounded to (KB303)."""
    report = kbitcheck.check_implementation(
        reference, models=["tiny:t5"], quants=["aqlm"], checkpointing=["off"], select=["KB303", "KB510"]
    )
    told = {result.rule: (result.status, "aqlm_t5_not_loaded" in result.finding) for result in report.results}
    assert told == {"KB303": (Status.PASS, False), "KB510": (Status.FAIL, True)}
    assert not any(report.counts(result) for result in report.results)
    (failed,) = [result for result in report.results if result.finding]
    another = tuple(dataclasses.replace(f, traits={"raised": "OSError: no space left"}) for f in failed.failures)
    spec = CaseSpec(implementation="peft", model="tiny:t5", quant="aqlm", checkpointing="off")
    bare = dataclasses.replace(failed, finding="")
    assert settle(bare, spec, {}, BACKEND.findings()).finding
    assert not settle(dataclasses.replace(bare, failures=another), spec, {}, BACKEND.findings()).finding
