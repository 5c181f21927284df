"""The product of a twin's backward: where a CPU would take long over halves, it sums in float32 and rounds once."""

import pytest
import torch

from kbitcheck.core.facts import YARDSTICKS
from kbitcheck.observe.twin.twins import MANY_ROWS, MANY_WEIGHTS, _product, sums_apart

CPU = torch.device("cpu")
WIDTH = 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_product_rounds_as_little_as_the_kernels_own(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, weight = (torch.randn(n, WIDTH, generator=generator).to(dtype) for n in (MANY_ROWS, WIDTH))
    assert sums_apart(MANY_ROWS, weight.numel(), dtype, CPU)
    exact = gradient.double() @ weight.double()
    own, kernels = ((made.double() - exact).norm() for made in (_product(gradient, weight), gradient @ weight))
    assert _product(gradient, weight).dtype == dtype
    assert own <= (exact.to(dtype).double() - exact).norm() * 1.001
    assert own <= kernels * 1.001 < YARDSTICKS * own


@pytest.mark.parametrize(
    ("rows", "weights", "dtype", "device"),
    [
        (MANY_ROWS - 1, MANY_WEIGHTS, torch.bfloat16, "cpu"),
        (MANY_ROWS, MANY_WEIGHTS - 1, torch.bfloat16, "cpu"),
        (MANY_ROWS, MANY_WEIGHTS, torch.float32, "cpu"),
        (MANY_ROWS, MANY_WEIGHTS, torch.float16, "cuda"),
    ],
)
def test_others_have_the_kernels_bits(rows: int, weights: int, dtype: torch.dtype, device: str) -> None:
    assert not sums_apart(rows, weights, dtype, torch.device(device))
