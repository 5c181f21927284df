"""bitsandbytes' folder: what is fast in it is held to the oracle, and private names of the library are where they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as F
import pytest
import torch
from bitsandbytes.autograd import _functions
from bitsandbytes.nn import modules
from hypothesis import given
from hypothesis import strategies as st
from kbitcheck_reference.formats import bitsandbytes as oracle

from kbitcheck import backends
from kbitcheck.backends.bitsandbytes import BACKEND
from kbitcheck.core.result import Party
from kbitcheck.core.rule import rules
from kbitcheck.observe.probes.snapshot import snapshot

SCHEMES = [scheme.name for scheme in BACKEND.schemes]


def layer_of(scheme: str, rows: int, columns: int, *, nested: bool = False, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    layer: Any
    if scheme == "int8":
        layer = modules.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    else:
        layer = modules.Linear4bit(columns, rows, bias=False, quant_type=scheme, compress_statistics=nested)
    layer.weight.data = weight
    return layer.to("cpu")


@given(st.sampled_from(SCHEMES), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 9))
def test_fast_unpacking_is_bitwise_the_oracles(scheme: str, rows: int, columns: int, nested: bool, seed: int) -> None:
    layer = layer_of(scheme, rows, columns, nested=nested, seed=seed)
    expected = oracle.unpack(layer)
    out = torch.full((rows, columns), torch.nan, dtype=torch.float64)
    assert torch.equal(backends.arithmetic(layer).exact(layer), expected)
    assert backends.arithmetic(layer).exact(layer, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)


def test_fast_unpacking_reads_the_layout_of_avx512() -> None:
    layer = layer_of("nf4", 64, 128)
    layer.weight.data, state = F._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert state.packing_format_for_cpu
    out = torch.empty(64, 128, dtype=torch.float64)
    assert torch.equal(backends.arithmetic(layer).exact(layer, out), oracle.unpack(layer))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("nested", "flipped"), [(False, False), (True, False), (False, True)])
def test_what_the_library_repacks_is_attributed_to_it(nested: bool, flipped: bool, saved: bool) -> None:
    """And what was changed beside that is not. A save lays codes back, and not scales."""
    model = torch.nn.Sequential(layer_of("nf4", 64, 128, nested=nested))
    before = snapshot(model)
    weight: Any = model[0].weight
    weight.data, weight.quant_state = F._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    if saved:
        model.state_dict()
    if flipped:
        weight.data.view(torch.uint8).view(-1)[0] ^= 1
    facts: Any = SimpleNamespace(wrapped=before, trained=snapshot(model), bias_after_forward={})
    failures = [each for each in rules()["KB104"].check(facts) if not each.ok]
    assert {each.where for each in failures} == {"0 (state)"} | ({"0.weight"} if flipped or not saved else set())
    assert {each.party for each in failures} == {Party.IMPLEMENTATION if flipped else Party.STACK}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_oracle_packs_as_the_library_does(scheme: str) -> None:
    layer = layer_of(scheme, 48, 64)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    packed = oracle.pack(weight, scheme)
    if scheme == "int8":
        # The library rounds to fp16 first.
        packed = oracle.pack(weight.half().float(), scheme)
        assert (packed["CB"].int() - layer.weight.data.int()).abs().max() <= 1
        assert torch.equal(packed["SCB"], layer.weight.SCB.float())
    else:
        assert torch.equal(packed["absmax"], layer.weight.quant_state.absmax)
        same = packed["packed"] == layer.weight.data.reshape(-1)
        assert same.float().mean() > 0.99  # the kernel's decision thresholds are rounded to float32


def test_every_corruption_shows_in_the_weight_it_stands_for() -> None:
    for scheme, part, nested in (
        ("nf4", "code", False),
        ("nf4", "scale", False),
        ("nf4", "nested", True),
        ("int8", "code", False),
        ("int8", "scale", False),
    ):
        layer = layer_of(scheme, 32, 64, nested=nested)
        before = oracle.unpack(layer)
        backends.recognition(layer).corrupt(layer, part)
        assert not torch.equal(oracle.unpack(layer), before), (scheme, part)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (modules.Params4bit, "_quantize"),
        (modules.Int8Params, "_quantize"),
        (F, "_convert_weight_packed_for_cpu"),
        (_functions, "MatMul8bitLt"),
        (_functions, "MatmulLtState"),
        (F, "name2qmap"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_private_name_is_where_it_was_in_0_50_2(owner: object, name: str) -> None:
    assert hasattr(owner, name)
