"""Packed weights of published layouts on the meta device: how many tensors of which shape and dtype, and no numbers.

A layout's tensors are those of its checkpoints. No kernel is there: a step unpacks each linear layer's weight, in the forward and
again in the backward, and holds none of it between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kbitcheck.backends.protocol import Recognition
from kbitcheck.core.errors import UsageError

# By name the shape and dtype of the tensors that hold one linear layer's weight; the first has the codes.
Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Layout = Callable[[int, int], Tensors]  # (out features, in features)
META = torch.device("meta")
IN_BLOCK = re.compile(r"\.\d+\.")


class PackedParameter(nn.Parameter):
    """The codes of a packed weight."""


class _Product(torch.autograd.Function):
    """``x @ W.T`` with a weight that is unpacked where it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, columns: int) -> Tensor:
        ctx.shape = rows, columns
        return linear(x, x.new_empty(rows, columns))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class PackedQuantLinear(nn.Module):
    """A linear layer whose weight is packed by ``scheme``. The reference recognises it by its name."""

    bias: Tensor | None

    def __init__(self, dense: nn.Module, scheme: str, layout: Layout) -> None:
        super().__init__()
        self.out_features, self.in_features = _sizes(dense)
        self.scheme = scheme
        (_, codes), *others = layout(self.out_features, self.in_features).items()
        self.weight = _codes(*codes)
        for name, (shape, dtype) in others:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=META))
        bias = getattr(dense, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.out_features, self.in_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class PackedHolders(Recognition):
    """Layers of this file whose scheme is one of ``schemes``."""

    def __init__(self, schemes: Sequence[str]) -> None:
        self._schemes = frozenset(schemes)

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, PackedQuantLinear) and module.scheme in self._schemes

    def packs(self, parameter: Tensor) -> bool:
        return isinstance(parameter, PackedParameter)

    def scheme(self, module: Any) -> str:
        return str(module.scheme)

    def stacks(self, module: nn.Module) -> Mapping[str, tuple[str, tuple[int, int]]]:
        stacks: Mapping[str, tuple[str, tuple[int, int]]] = vars(module).get("packed_stacks", {})
        return {name: each for name, each in stacks.items() if each[0] in self._schemes}


def linears(model: nn.Module, *, in_blocks: bool) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the linear layers; with ``in_blocks``, of those in the repeated layers alone."""
    for name, module in list(model.named_modules()):
        if _is_linear(module) and (not in_blocks or IN_BLOCK.search(name)):
            yield name, module


def pack_linear(model: nn.Module, name: str, scheme: str, layout: Layout) -> None:
    """Put a packed layer in the place of a linear one."""
    model.set_submodule(name, PackedQuantLinear(model.get_submodule(name), scheme, layout))


def stacked(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Name, module and three-dimensional parameters of each module that holds the weights of several experts."""
    for name, module in list(model.named_modules()):
        wide = [n for n, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
        if wide and name.endswith("experts"):
            yield name, module, wide


def pack_stack(model: nn.Module, module: Any, names: Sequence[str], scheme: str, layout: Layout) -> None:
    """Put packed tensors in the place of stacked weights: those of each expert's linear layers, one after the other.

    A checkpoint has the gate and the projection up, which transformers joins, as two layers.
    """
    stacks = {}
    for name in names:
        experts, rows, columns = getattr(module, name).shape
        hidden, up = _hidden(model), "down" not in name
        if hidden == (rows if up else columns) != (columns if up else rows):  # stored as (in, out)
            rows, columns = columns, rows
        joined = 2 if "gate_up" in name else 1
        tensors = layout(rows // joined, columns)
        delattr(module, name)
        (_, (shape, dtype)), *others = tensors.items()
        module.register_parameter(name, _codes((experts * joined, *shape), dtype))
        for other, (shape, dtype) in others:
            module.register_buffer(f"{name}_{other}", torch.empty((experts * joined, *shape), dtype=dtype, device=META))
        stacks[name] = scheme, (experts * rows, columns)
    module.packed_stacks = {**vars(module).get("packed_stacks", {}), **stacks}
    module.forward = _no_kernel


def pack_all(model: nn.Module, scheme: str, layout: Layout, stays: Callable[[str], bool]) -> None:
    """Pack every linear layer and stack of experts, but those that ``stays`` says of by their names."""
    for name, _ in linears(model, in_blocks=False):
        if not stays(name):
            pack_linear(model, name, scheme, layout)
    for name, module, wide in stacked(model):
        if not stays(name):
            pack_stack(model, module, wide, scheme, layout)


def unpack_all(model: nn.Module, scale: str) -> None:
    """Give packed linear layers as many plain numbers as they stand for, in the dtype of their buffer ``scale``."""
    for module in model.modules():
        if isinstance(module, PackedQuantLinear):
            dtype = module.get_buffer(scale).dtype
            module.weight = _codes((module.out_features, module.in_features), dtype)


def skipped(skip: Sequence[str]) -> Callable[[str], bool]:
    """Whether a checkpoint whose list of unquantized modules is ``skip`` leaves out the one of this name.

    An entry stands for the modules of its name and all in them, or is a pattern of paths from the first module on.
    """
    return lambda name: any(f".{key}." in f".{name}." or re.match(rf"(?:{key})(?=\.|$)", name) for key in skip)


def _no_kernel(*arguments: Any, **named: Any) -> Any:
    raise UsageError("packed experts have no step without their kernels")


def _codes(shape: tuple[int, ...], dtype: torch.dtype) -> PackedParameter:
    return PackedParameter(torch.empty(shape, dtype=dtype, device=META), requires_grad=False)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _sizes(dense: Any) -> tuple[int, int]:
    rows, columns = dense.weight.shape
    return (int(columns), int(rows)) if type(dense).__name__ == "Conv1D" else (int(rows), int(columns))


def _hidden(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "hidden_size", 0))


def groups(columns: int, size: int) -> int:
    """How many groups of ``size`` columns share a scale; -1 stands for all columns."""
    return 1 if size in (-1, 0) else -(-columns // size)
