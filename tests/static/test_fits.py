"""Sizes and optimizers."""

import pytest
import torch

from kbitcheck.core import memory_sizes as fits
from kbitcheck.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("24 gib", 24 << 30), ("24G", 24 << 30), ("80GB", 80 * 10**9), ("1.5KiB", 1536), ("7", 7)],
)
def test_memory_is_read_with_units(text, size):
    assert fits.parse(text) == size


def test_a_gpu_is_a_size():
    assert (fits.parse("T4"), fits.parse("a100-80"), fits.parse("RTX 4090")) == (16 << 30, 80 << 30, 24 << 30)
    assert fits.gpu("rtx 4090") == "RTX 4090"
    assert fits.gpu("24GiB") == ""
    named = {name for names in fits.GPUS.values() for name in names.split(", ")}
    assert named == fits.CAPABILITIES.keys()


def test_gpus_of_one_size_take_the_same_kernels():
    assert {size: fits.alike(size) for size in (16 << 30, 32 << 30)} == {16 << 30: "T4", 32 << 30: "RTX 5090"}
    for size in fits.GPUS:
        assert len({fits.CAPABILITIES[name] >= (8, 0) for name in fits.alike(size).split(", ")}) == 1


@pytest.mark.parametrize("text", ["", "lots", "0", "-1GiB", "24XB", "24GiBs", "GiB", "0.1B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="24GiB"):
        fits.parse(text)


SIZES = {"small": 4095, "edge": 4096, "odd": 5000, "large": 100_000}


def test_adamw_keeps_what_torch_keeps():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in SIZES.values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    assert fits.optimizers(SIZES)["adamw"] == kept


def test_8_bit_adamw_keeps_what_bitsandbytes_keeps():
    from bitsandbytes.optim.adamw import AdamW8bit

    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in SIZES.values()]
    optimizer = AdamW8bit(parameters)
    optimizer.check_overrides()
    group = optimizer.param_groups[0]
    for index, parameter in enumerate(parameters):
        optimizer.init_state(group, parameter, 0, index)
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    kept = sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())
    assert fits.optimizers(SIZES)["adamw-8bit"] == kept


def test_what_is_paged_is_not_on_the_device():
    assert fits.optimizers(SIZES)["paged-adamw"] == 8 * (4095 + 4096 + 5000)
