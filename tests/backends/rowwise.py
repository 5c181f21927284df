"""A second backend, whole: plain row-wise int8 with a layer class of its own, and its format for the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kbitcheck.extend import Arithmetic, Backend, Choice, NotApplicable, Recognition, Scheme

STEPS = 127.0


class RowwiseProduct(torch.autograd.Function):
    """``x @ W.T`` whose weight is unpacked anew in the backward, so that no float copy of it is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: RowwiseLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.unpacked().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked().to(gradient.dtype), None


class RowwiseLinear(nn.Module):
    """A linear layer that holds int8 codes and one float32 scale a row."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        weight: Tensor = dense.weight.detach()  # type: ignore[operator]
        weight = weight.T if type(dense).__name__ == "Conv1D" else weight
        self.out_features, self.in_features = weight.shape
        scales = weight.abs().amax(dim=1).float() / STEPS
        codes = (weight.float() / scales.clamp(min=1e-30).unsqueeze(1)).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = scales  # a plain attribute: neither a parameter nor a buffer
        self.bias: Any = getattr(dense, "bias", None)

    def unpacked(self) -> Tensor:
        return self.weight.float() * self.scales.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = RowwiseProduct.apply(x, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class RowwiseRecognition(Recognition):
    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, RowwiseLinear)

    def packs(self, parameter: Tensor) -> bool:
        return parameter.dtype == torch.int8 and isinstance(parameter, nn.Parameter)

    def scheme(self, module: nn.Module) -> str:
        return "rowwise-int8"

    def state(self, module: Any) -> Mapping[str, Any]:
        return {"scales": module.scales}

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        if part == "code":
            module.weight.data[0, 0] ^= 1
        elif part == "scale":
            module.scales[0] *= factor
        else:
            raise NotApplicable(f"row-wise int8 has no {part}")


class RowwiseArithmetic(Arithmetic):
    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        weight: Tensor = module.unpacked()
        return weight


class Rowwise(Backend):
    name = "rowwise"
    method = "rowwise"
    schemes = (Scheme("rowwise-int8", 8),)

    @cached_property
    def recognition(self) -> Recognition:
        return RowwiseRecognition()

    @cached_property
    def arithmetic(self) -> Arithmetic:
        return RowwiseArithmetic()

    def quantize(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        for name, module in list(model.named_modules()):
            dense = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if dense and not any(f".{skipped}." in f".{name}." for skipped in skip):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, RowwiseLinear(module))


class RowwiseFormat:
    """The oracle's side."""

    PACKAGE = "rowwise"

    @staticmethod
    def packs(parameter: Tensor) -> bool:
        return parameter.dtype == torch.int8

    @staticmethod
    def holds(module: nn.Module) -> bool:
        return type(module).__name__ == "RowwiseLinear"

    @staticmethod
    def unpack(layer: Any) -> Tensor:
        weight: Tensor = layer.weight.detach().double() * layer.scales.double().unsqueeze(1)
        return weight

    @staticmethod
    def pack(weight: Tensor, scheme: str) -> dict[str, Tensor]:
        scales = weight.abs().amax(dim=1).float() / STEPS
        return {"codes": (weight / scales.unsqueeze(1)).round().to(torch.int8), "scales": scales}


BACKEND, FORMAT = Rowwise(), RowwiseFormat()
