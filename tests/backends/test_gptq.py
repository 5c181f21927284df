"""GPTQModel's plain layer: its arithmetic is the format's, and what is packed here is what it reads."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from kbitcheck_reference import dequantized_weight
from kbitcheck_reference.formats import gptq as oracle
from torch import nn

from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.observe.forecast.weights import groups
from kbitcheck.observe.probes.snapshot import snapshot
from tests.backends.products import assert_backward_is_the_product
from tests.shallow import shallow

BACKEND = registry.of_scheme("gptq-int4")
WHY = BACKEND.not_on_load()
installed = pytest.mark.skipif(bool(WHY), reason=WHY or "installed")


def quantized(
    rows: int, columns: int, text: str = "gptq-int4,group=32", *, bias: bool = False
) -> tuple[torch.Tensor, Any]:
    """A weight and the library's layer of it."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(columns, rows, bias=bias))
    model.config = type("Config", (), {})()
    weight = model[0].weight.detach().clone()
    BACKEND.quantize(model, Quantization.parse(text), ())
    return weight, model[0]


def test_the_last_word_of_a_row_may_be_short() -> None:
    weight = torch.randn(36, 108)
    packed: dict[str, Any] = oracle.pack(weight, "gptq-int4", 64)
    assert {n: tuple(t.shape) for n, t in packed.items()} == {
        "qweight": (14, 36), "qzeros": (2, 5), "scales": (2, 36), "g_idx": (108,),
    }  # fmt: skip
    steps = packed["scales"].double()[packed["g_idx"].long()].T
    # Half a step, at the upper end, which has no code, a whole one; the scale's rounding moves that by 2^-11 of 8 steps.
    assert ((oracle.dequantize(**packed) - weight.double()).abs() <= steps * (1 + 8 * 2**-11)).all()


@pytest.mark.skipif("not installed" not in WHY, reason="asks what is said without gptqmodel, which is installed")
def test_without_it_a_model_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"gptqmodel is not installed: pip install 'kbitcheck\[gptq\]'"):
        shallow("tiny:llama").load(Quantization.parse("gptq-int4"))


def test_other_widths_are_of_checkpoints_alone() -> None:
    with pytest.raises(UsageError, match=r"gptqmodel is not installed|to 4 bits alone"):
        shallow("tiny:llama").load(Quantization.parse("gptq-int8"))


@installed
@pytest.mark.parametrize("text", ["gptq-int4", "gptq-int4,group=32,act", "gptq-int4,group=all"])
def test_the_format_is_the_library_s(text: str) -> None:
    for rows, columns in ((64, 256), (36, 108)):
        weight, layer = quantized(rows, columns, text)
        for training in (True, False):  # it unpacks in two ways
            unpacked = layer.train(training).dequantize_weight()
            assert dequantized_weight(layer).half().equal(unpacked.T), (rows, columns, training)
        assert (dequantized_weight(layer) - weight.double()).norm() < 0.2 * weight.norm()
        assert layer.g_idx.diff().ge(0).all() != ("act" in text and len(layer.scales) > 1)


@installed
def test_a_checkpoint_of_the_first_version_is_read_once_it_is_turned() -> None:
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    _, layer = quantized(64, 128)
    first: dict[str, Any] = oracle.pack(torch.randn(64, 128), "gptq-int4", 32, symmetric=False)
    exact = oracle.dequantize(**first)
    for name, tensor in first.items():
        setattr(layer, name, tensor)
    layer.qzero_format(1)
    assert dequantized_weight(layer).equal(exact)
    convert_gptq_v1_to_v2_format_module(layer, bits=4, pack_dtype=torch.int32)
    assert dequantized_weight(layer).equal(exact)


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_is_the_product_with_the_oracle_s_weight(dtype: torch.dtype) -> None:
    _, layer = quantized(64, 128, bias=True)
    assert_backward_is_the_product(layer, dtype, unpacked_to=torch.float16)


@installed
def test_buffers_that_are_packed_weights_are_counted_as_such() -> None:
    model = shallow("tiny:llama").meta(Quantization.parse("gptq-int4"))
    facts = snapshot(model)
    sizes = groups(model, facts)
    packed = sum(group.packed for group in sizes.values())
    assert packed == sum(t.nbytes for n, t in facts.buffers.items() if n.endswith(".qweight")) > 0
    assert sum(group.state for group in sizes.values()) == 0  # scales and zeros are buffers, which count as such
    assert sum(g.packed + g.state + g.unquantized + g.buffers for g in sizes.values()) == facts.nbytes
    assert sum(g.quantized for g in sizes.values()) == sum(
        x.in_features * x.out_features for x in facts.layers.values()
    )


@installed
def test_what_is_loaded_unpacks_eagerly_and_is_copied_whole() -> None:
    model = shallow("tiny:llama").load(Quantization.parse("gptq-int4"))
    _, layer = next(backends.quantized_layers(model))
    assert "dequantize_weight" not in vars(layer)  # the library puts a compiled one there
    # Once it is saved, transformers reads its zeros by this, as KB510 does.
    assert model.config.quantization_config.format == f"gptq_v{backends.recognition(layer).state(layer)['version']}"
    copied: Any = copy.deepcopy(layer)
    before = dequantized_weight(layer)
    backends.recognition(copied).corrupt(copied, "scale")
    assert dequantized_weight(layer).equal(before)
    assert not dequantized_weight(copied).equal(before)
    assert all({"scales", "qzeros", "g_idx"} <= each.state.keys() for each in snapshot(model).layers.values())


@installed
def test_the_library_is_imported_where_a_model_is_quantized_by_it() -> None:
    """It starts threads and sets environment variables; the others' models are judged without it."""
    lines = (
        "import sys",
        "from kbitcheck import backends",
        "backends.load()",
        "assert 'gptqmodel' not in sys.modules",
        "from kbitcheck.backends.quantization import Quantization",
        "from kbitcheck.models.sources.resolve import resolve",
        "model = resolve('tiny:llama').meta(Quantization.parse('gptq-int4'))",
        "assert 'gptqmodel' in sys.modules",
        "assert any(backends.quantized_layers(model))",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True)
