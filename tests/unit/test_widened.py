"""Parameters that are widened when they are used, against copies that are wide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kbitcheck.core.cases import CaseSpec
from kbitcheck.observe.loaded import loaded_model
from kbitcheck.observe.probes import layers
from kbitcheck.observe.twin import twins as twin
from kbitcheck.observe.twin import wide_parameter as widened
from kbitcheck.observe.twin.wide_parameter import Widened

if TYPE_CHECKING:
    from collections.abc import Callable


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "embedding": lambda w: torch.nn.functional.embedding(torch.tensor([[3, 1], [0, 3]]), w),
    "linear": lambda w: torch.nn.functional.linear(drawn(2, 5, 4).to(w.dtype), w),
    "transposed": lambda w: drawn(5, 6).to(w.dtype) @ w,
    "picked": lambda w: w[torch.tensor([2, 0])],
    "a row": lambda w: w[1] * 3,
    "columns": lambda w: w[:, 1:3].sum(),
    "halves": lambda w: w.chunk(2, dim=-1)[1].exp(),
    "added": lambda w: w + w,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_computed_is_what_a_wide_copy_gives(name: str, dtype: torch.dtype) -> None:
    weight = drawn(6, 4)
    found, wanted = OPERATIONS[name](Widened(weight, dtype)), OPERATIONS[name](weight.to(dtype))
    assert found.dtype == dtype
    assert type(found + 0) is torch.Tensor
    assert torch.equal(found + 0, wanted)


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (4, 6), (1, 7), (7, 1)])
def test_a_product_in_pieces(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "PIECE", 8)
    weight, x = drawn(rows, columns), drawn(3, rows).double().requires_grad_(True)
    found = x @ Widened(weight, torch.float64)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    # Sums of at most 7 products of bfloat16 numbers, which float64 holds exactly, of magnitudes below 100.
    assert torch.allclose(found, x @ weight.double(), rtol=0, atol=7 * 100 * torch.finfo(torch.float64).eps)
    assert torch.allclose(
        gradient, weight.double().sum(1).expand(3, rows), rtol=0, atol=7 * 100 * torch.finfo(torch.float64).eps
    )


def test_it_is_not_written_to() -> None:
    weight = drawn(2, 2)
    before = weight.clone()
    with pytest.raises(RuntimeError, match="writes to a weight of the float twin"):
        Widened(weight, torch.float64).clamp_(0, 1)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("quant", ["nf4", "fp4,double,compute=fp32", "int8"])
@pytest.mark.parametrize("model", ["tiny:llama", "tiny:mixtral", "tiny:gpt2"])
def test_twins_are_the_same_however_weights_are_held(model: str, quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, heads, experts, tied and quantized weights; the two twins' gradients and logits."""
    spec = CaseSpec(model=model, quant=quant, implementation="reference")

    def held(limit: int) -> tuple[twin.Twins, list[torch.Tensor]]:
        monkeypatch.setattr(twin, "LARGE_BYTES", limit)
        monkeypatch.setattr(layers, "KEPT_BYTES", limit)
        kept = loaded_model(spec)
        base = type(kept).from_source(kept.source, spec)
        made = twin.float64(base.pristine, base.weights)
        assert any(type(p.data) is Widened for p in made.parameters()) is (limit == 0)
        function = base.function("peft")
        assert bool(base.weights._scratches) is (limit == 0)
        return base.twins(spec), [function.exact.logits, function.rounded.logits]

    (wide, logits), (widened_, also) = held(1 << 60), held(0)
    assert all(map(torch.equal, logits, also))
    for side in ("exact", "rounded"):
        gradients, others = getattr(wide.whole, side), getattr(widened_.whole, side)
        assert gradients.keys() == others.keys()
        assert all(torch.equal(g, others[n]) for n, g in gradients.items() if g is not None)
