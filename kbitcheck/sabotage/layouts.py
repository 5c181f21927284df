"""Faults of KB303 that show on tensors of a layout or a size that most steps never hand to a layer."""

from collections.abc import Callable
from typing import Any

import torch

from kbitcheck.sabotage.fault import breaks
from kbitcheck.sabotage.helpers import quantized
from kbitcheck.sabotage.hooks import change_gradient, change_input, change_output

Read = Callable[[torch.Tensor], torch.Tensor]


def _stored(x: torch.Tensor, start: int) -> torch.Tensor:
    """What a kernel reads that takes a pointer for a tensor: numbers one after the other, from ``start`` on in the storage."""
    own = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())[start:]
    return own.repeat(-(-x.numel() // max(len(own), 1)))[: x.numel()].view(x.shape)


class _Reads(torch.autograd.Function):
    """The identity as a kernel of one's own computes it: what it ``read`` of its input is what it returns."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, read: Read) -> torch.Tensor:
        return read(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@breaks("KB303", model="tiny:llama")
def gradient_read_as_if_contiguous(model: Any) -> None:
    change_output(
        quantized(model)[2],
        lambda y: change_gradient(y, lambda gradient: _stored(gradient, int(gradient.storage_offset()))),
    )


@breaks("KB303", quant="int8")
def storage_offset_ignored(model: Any) -> None:
    change_input(quantized(model)[1], lambda x: _Reads.apply(x, lambda x: _stored(x.contiguous(), 0)))


@breaks("KB303")
def layer_that_needs_a_row(model: Any) -> None:
    """As a search for the largest number does, which an expert without tokens meets."""
    change_input(quantized(model)[3], lambda x: x.clamp(max=x.detach().max()))
