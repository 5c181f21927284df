"""Casting keeps values, sharing and memory bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference.upcast import castable_parameters, upcast
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_value_is_kept(dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    parameter = nn.Parameter(values.clone())
    upcast([parameter])
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter.to(dtype).view(torch.int16), values.view(torch.int16))


def test_parameters_that_share_storage_still_do() -> None:
    fused = torch.randn(6, 4).bfloat16()
    views = [fused[:2], fused[2:], fused.t(), fused[1:1]]
    parameters = [nn.Parameter(view) for view in views]
    expected = [view.float() for view in views]

    upcast(parameters)

    for parameter, old, value in zip(parameters, views, expected, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, value)
        assert parameter.stride() == old.stride()
    parameters[2].data.fill_(7.0)
    assert torch.equal(parameters[0], torch.full((2, 4), 7.0))
    assert torch.equal(parameters[1], torch.full((4, 4), 7.0))


def test_parameters_on_meta_are_not_taken_for_one_storage() -> None:
    parameters = [nn.Parameter(torch.empty(size, device="meta", dtype=torch.float16)) for size in (2, 3)]
    upcast(parameters)
    assert [(p.shape, p.dtype, p.is_meta) for p in parameters] == [
        (torch.Size([2]), torch.float32, True),
        (torch.Size([3]), torch.float32, True),
    ]


class LiveBytes(TorchDispatchMode):  # torch's
    """Counts the bytes of the storages that are alive whenever an operator has returned."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()  # torch's
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors:
            self.see(tensor)
        self.peak = self.total()

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # torch's
        self.alive[reference.cdata] = (reference, storage.nbytes())

    def total(self) -> int:
        sizes: list[int] = []
        for reference, size in self.alive.values():
            expired: bool = reference.expired()  # torch's
            if not expired:
                sizes.append(size)
        return sum(sizes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.see(result)
        self.peak = max(self.peak, self.total())
        return result


def test_peak_is_one_parameter_above_the_result() -> None:
    model = nn.ModuleList(nn.Linear(32, size, bias=False).half() for size in (8, 64, 32, 64))
    parameters = list(model.parameters())
    before = sum(parameter.nbytes for parameter in parameters)
    largest = max(parameter.nbytes for parameter in parameters)
    with LiveBytes([parameter.data for parameter in parameters]) as memory:
        upcast(castable_parameters(model))
    after = sum(parameter.nbytes for parameter in parameters)
    assert after == 2 * before
    assert memory.total() == after
    assert after < memory.peak <= after + largest
