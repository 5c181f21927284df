"""CUDA's autocast, without CUDA: torch's own lists, what they make of tensors, and what is kept meanwhile."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kbitcheck.observe import internals
from kbitcheck.observe.forecast import cuda_autocast as autocast
from kbitcheck.observe.forecast.fake_tensors import Counted, World
from kbitcheck.observe.forecast.runtime import Runtime

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def listed(policy):
    """Operators in a list of torch's header."""
    (body,) = re.findall(rf"#define AT_FORALL_{policy}\(_\)((?:.*\\\n)*.*)", HEADER.read_text())
    return {
        f"{name}.{overload}" if overload else name for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", body)
    }


@pytest.mark.skipif(not HEADER.exists(), reason="torch's headers are not installed")
def test_the_policies_are_those_of_the_installed_torch():
    ours = internals.autocast_operators("CUDA")
    convolutions = {"cudnn_convolution", "cudnn_convolution_transpose"}  # registered elsewhere
    assert listed("LOWER_PRECISION_FP") == (autocast.HALF_ARGUMENTS - convolutions) & ours
    assert listed("FP32_SET_OPT_DTYPE") == autocast.FLOAT32_RESULT & ours
    assert listed("PROMOTE") == autocast.WIDEST_ARGUMENTS & ours
    stated = autocast.HALF_ARGUMENTS | autocast.FLOAT32_RESULT | autocast.WIDEST_ARGUMENTS
    assert listed("FP32") == ours - stated - autocast.APPENDED_DTYPE.keys() - autocast.REFUSED


OPERATORS = {
    "linear": (lambda x: F.linear(x, x), BF16, BF16),
    "matmul": (lambda x: x @ x, BF16, BF16),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x), BF16, BF16),
    "softmax": (lambda x: x.softmax(-1), FP32, FP32),
    "softmax to a dtype": (lambda x: x.softmax(-1, dtype=FP64), FP64, FP64),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:]), FP32, FP32),
    "sum": (lambda x: x.sum(), FP32, FP32),
    "mean": (lambda x: x.mean(), BF16, FP32),  # on no list
    "pow": (lambda x: x.pow(2), FP32, FP32),
    "norm": (lambda x: x.norm(), FP32, FP32),
    "norm of rows": (lambda x: torch.norm(x, 2, -1), FP32, FP32),
    "cross entropy": (lambda x: F.cross_entropy(x, x.new_zeros(len(x), dtype=torch.int64)), FP32, FP32),
    "addcmul": (lambda x: torch.addcmul(x, x, x), BF16, FP32),
    "of two dtypes": (lambda x: torch.addcmul(x, x.float(), x), FP32, FP32),
    "gelu": (F.gelu, BF16, FP32),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_results_have_the_dtypes_of_cuda(name):
    compute, of_half, of_float = OPERATORS[name]
    world, casts = World(), autocast.Casts(autocast.Watcher())
    with casts.installed(), world.mode, torch.autocast("cpu", dtype=BF16):
        assert compute(torch.empty(8, 8, dtype=BF16)).dtype == of_half
        assert compute(torch.empty(8, 8)).dtype == of_float
        with torch.autocast("cpu", enabled=False):
            assert compute(torch.empty(8, 8, dtype=FP64)).dtype == FP64


def test_the_cpus_own_autocast_is_back_afterwards():
    half = torch.ones(4, 4, dtype=BF16)
    for installed in (True, False):
        with (
            autocast.Casts(autocast.Watcher()).installed() if installed else torch.no_grad(),
            torch.autocast("cpu", dtype=BF16),
        ):
            assert (half @ half).dtype == BF16
            assert half.softmax(-1).dtype == (FP32 if installed else BF16)  # on CUDA's list alone


def test_casts_of_trained_weights_are_kept_until_autocast_ends():
    world, casts = World(), autocast.Casts(autocast.Watcher())
    with world.mode:
        x, trained, frozen = torch.empty(8, 8, dtype=FP16), torch.empty(8, 8, requires_grad=True), torch.empty(8, 8)
    live = Counted([x, trained, frozen])
    floor = live.now
    with casts.installed(), world.mode, live, torch.no_grad():
        with torch.autocast("cpu", dtype=FP16):
            for weight in (frozen, trained, trained, trained.view(8, 8)):
                F.linear(x, weight)
            assert live.now - floor == 8 * 8 * 2  # one cast of one weight
        assert live.now == floor
        with torch.autocast("cpu", dtype=FP16, cache_enabled=False):
            F.linear(x, trained)
            assert live.now == floor


def test_a_weight_that_is_cast_gets_a_float32_gradient():
    world = World()
    with world.mode:
        weight = torch.nn.Parameter(torch.empty(8, 8))
    with world.entered(Runtime(autocast=BF16)):
        with torch.autocast("cpu", dtype=BF16):
            loss = F.linear(torch.empty(4, 8), weight).sum()
        loss.backward()
    assert weight.grad is not None
    assert (loss.dtype, weight.grad.dtype) == (FP32, FP32)
