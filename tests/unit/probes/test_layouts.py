"""A quantized layer alone, on inputs and gradients that no training step hands it."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn

from kbitcheck.core.facts import LayerBackward, MisreadLayout
from kbitcheck.core.result import Party
from kbitcheck.judge.layers import layer_backward_exact
from kbitcheck.observe.probes.layers import Weights
from kbitcheck.observe.probes.layouts import LAYOUTS, SMALL, misread
from kbitcheck.sabotage.hooks import change_gradient, change_input, change_output
from kbitcheck.sabotage.layouts import _Reads, _stored
from tests.unit.rules.test_gradients import LIVE


def layer(inner: int, outer: int, kind: str = "nf4", *, bias: bool = False) -> Any:
    if kind == "int8":
        made: Any = Linear8bitLt(inner, outer, bias=bias, has_fp16_weights=False)
    else:
        made = Linear4bit(inner, outer, bias=bias, compute_dtype=torch.bfloat16, quant_type=kind)
    return made.to("cpu").requires_grad_(False).train()


def seen(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[MisreadLayout, ...]:
    return misread(module, partial(Weights(nn.Sequential(module)).exact, "0"), dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(("inner", "outer"), [(64, 32), (33, 17), (1, 40), (150, 1), (1, 1)])
def test_the_stacks_own_layers_read_every_layout_at_every_size(inner: int, outer: int, kind: str, dtype: Any) -> None:
    for seed in range(3):
        assert seen(layer(inner, outer, kind, bias=bool(seed)), seed, dtype) == ()


def reads_gradient_as_contiguous(module: nn.Module) -> None:
    change_output(module, lambda y: change_gradient(y, lambda g: _stored(g, int(g.storage_offset()))))


def ignores_offset_of_gradient(module: nn.Module) -> None:
    change_output(module, lambda y: change_gradient(y, lambda g: _stored(g.contiguous(), 0)))


def ignores_offset_of_input(module: nn.Module) -> None:
    change_input(module, lambda x: _Reads.apply(x, lambda x: _stored(x.contiguous(), 0)))


def reads_input_as_contiguous(module: nn.Module) -> None:
    change_input(module, lambda x: _Reads.apply(x, lambda x: _stored(x, int(x.storage_offset()))))


def raises_on_one_row(module: nn.Module) -> None:
    change_input(module, lambda x: x + 0 * x.reshape(-1, x.shape[-1])[1] if x.numel() else x)


def raises_on_no_rows(module: nn.Module) -> None:
    change_input(module, lambda x: x.clamp(max=x.detach().max()))


STRIDED = {"transposed", "with its first dimensions swapped", "every other column of a wider one"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("damage", "side", "layouts", "edge"),
    [
        (reads_gradient_as_contiguous, "gradient", STRIDED, "one row"),  # whose gradient is expanded
        (reads_input_as_contiguous, "input", STRIDED, ""),
        (ignores_offset_of_gradient, "gradient", {"with a storage offset"}, ""),
        (ignores_offset_of_input, "input", {"with a storage offset"}, ""),
        (raises_on_one_row, "", set(), "one row"),
        (raises_on_no_rows, "", set(), "no rows"),
    ],
)
def test_a_layer_that_misreads_a_layout_is_seen_in_that_layout_alone(
    damage: Any, side: str, layouts: set[str], edge: str, kind: str, seed: int
) -> None:
    module = layer(64, 32, kind)
    damage(module)
    named = {failure.what for failure in seen(module, seed)}
    assert all(not failure.bare for failure in seen(module, seed))
    for name in LAYOUTS:
        (at,) = [what for what in named if f"{side} {name}" in what] if name in layouts else [""]
        named.discard(at)
    assert [what.partition(",")[0] for what in named] == ([edge] if edge else [])


def test_what_the_librarys_own_layer_does_too_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: run(self, x.clamp(max=x.detach().max())))
    (failure,) = seen(layer(64, 32))
    assert (failure.what, failure.bare) == ("no rows", True)
    assert failure.actual.startswith("raises ")


def test_a_layer_that_is_wrong_on_contiguous_numbers_or_is_large_is_not_judged_by_layouts() -> None:
    wrong = layer(64, 32)
    change_input(wrong, lambda x: change_gradient(x.clamp(max=x.detach().max()), lambda g: 2 * g))
    assert seen(wrong) == ()
    large = layer(SMALL // 32, 64)
    raises_on_no_rows(large)
    assert seen(large) == ()


@pytest.mark.parametrize(("bare", "party"), [(True, Party.STACK), (False, Party.IMPLEMENTATION)])
def test_a_misread_layout_breaks_the_rule_and_is_the_librarys_where_its_own_layer_does_it(
    bare: bool, party: Party
) -> None:
    layout = MisreadLayout(what="no rows", actual="raises RuntimeError: no", bare=bare)
    facts: Any = SimpleNamespace(
        gradients={"q.lora_A": LIVE},
        layer_backwards={"q": LayerBackward(reached=True, carried=True, gain_bound=1e-3, layouts=(layout,))},
        mixed_backwards={},
        wrapped=SimpleNamespace(layers={}),
    )
    right, failed = inspect.unwrap(layer_backward_exact)(facts)
    assert right.ok
    assert (failed.ok, failed.where, failed.party) == (False, "q (no rows)", party)
