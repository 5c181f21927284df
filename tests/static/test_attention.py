"""Which attention kernel a CUDA device takes, and what it keeps."""

import pytest
import torch

from kbitcheck.observe import internals
from kbitcheck.observe.forecast.attention import AMPERE, workspace
from kbitcheck.observe.forecast.cuda_autocast import Watcher
from kbitcheck.observe.forecast.fake_tensors import World
from kbitcheck.observe.forecast.runtime import Runtime

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURING, ADA = (7, 5), (8, 9)
LENGTH, HEADS = 256, 4
SCORES = HEADS * LENGTH**2


class Listener(Watcher):
    def __init__(self):
        self.kernels = []

    def attends(self, kernel):
        self.kernels.append(kernel)


def attend(
    *, dtype=BF16, capability=AMPERE, autocast=None, key_heads=HEADS, head=64, mask=None, dropout=0.0, length=LENGTH
):
    """The kernel, and the largest number of elements that it saves."""
    world = World()
    watcher = Listener()
    saved: list[torch.Tensor] = []
    runtime = Runtime(capability=capability, autocast=autocast)
    with world.entered(runtime, watcher), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        query = torch.empty(1, HEADS, length, head, dtype=dtype, requires_grad=True)
        key = torch.empty(1, key_heads, length, head, dtype=dtype, requires_grad=True)
        bias = None if mask is None else torch.ones(1, 1, length, length, dtype=mask)
        settings = {"attn_mask": bias, "dropout_p": dropout, "is_causal": mask is None, "enable_gqa": key_heads < HEADS}
        with runtime.autocasting():
            out = torch.nn.functional.scaled_dot_product_attention(query, key, key, **settings)
    assert out.shape == query.shape
    (kernel,) = watcher.kernels
    return kernel, max(t.untyped_storage().nbytes() // t.element_size() for t in saved)


CHOICES = [
    ({}, "flash", 0),
    ({"dtype": FP32}, "memory-efficient (float32)", 0),
    ({"dtype": FP32, "autocast": BF16}, "flash", 0),
    ({"dtype": FP32, "key_heads": 2}, "math (float32 and grouped queries)", SCORES),
    ({"dtype": FP32, "key_heads": 2, "autocast": BF16}, "flash", 0),
    ({"mask": torch.bool}, "memory-efficient (a mask)", LENGTH**2),
    ({"mask": BF16}, "memory-efficient (a mask)", LENGTH**2),
    ({"mask": BF16, "length": 250}, "memory-efficient (a mask)", 250 * 256),  # rows are padded
    ({"dtype": FP16, "capability": TURING}, "memory-efficient (a GPU older than Ampere)", 0),
    (
        {"dtype": FP16, "capability": TURING, "key_heads": 1},
        "math (a GPU older than Ampere and grouped queries)",
        SCORES,
    ),
    ({"capability": TURING}, "math (a GPU older than Ampere and bfloat16)", SCORES),
    ({"head": 512}, "memory-efficient (heads of 512)", 0),
    ({"head": 60, "mask": BF16}, "math (a mask and heads of 60)", SCORES),
    ({"head": 256, "capability": ADA}, "flash", 0),
    ({"head": 256, "capability": ADA, "dropout": 0.1}, "memory-efficient (heads of 256)", 0),
    ({"head": 224, "capability": ADA}, "memory-efficient (heads of 224)", 0),
]


@pytest.mark.parametrize(("arguments", "kernel", "saved"), CHOICES)
def test_the_kernel_is_that_of_torch(arguments, kernel, saved):
    chosen, largest = attend(**arguments)
    assert chosen == kernel
    head, length = arguments.get("head", 64), arguments.get("length", LENGTH)
    assert largest == max(saved, HEADS * length * head)


def test_flash_attention_pads_heads():
    assert attend(head=60) == ("flash", HEADS * LENGTH * 64)


@pytest.mark.parametrize(("dtype", "key_heads"), [(BF16, 4), (BF16, 2), (FP32, 4)])
def test_a_backward_sums_in_float32(dtype, key_heads):
    with World().mode:
        query, key = torch.empty(2, 4, 200, 64, dtype=dtype), torch.empty(2, key_heads, 200, 64, dtype=dtype)
    rows = 2 * 4 * 256
    expanded = 2 * 2 * 2 * 200 * 4 * 64 if key_heads < 4 else 0
    accumulated = 4 * rows * 64 if dtype == BF16 else 0
    assert workspace(internals.FLASH_BACKWARD, (None, query, key)) == 4 * rows + accumulated + expanded
    assert workspace(torch.ops.aten.mm.default, ()) == 0
