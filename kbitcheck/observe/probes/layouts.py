"""A quantized layer's forward and backward on inputs and gradients as other code may hand them over.

A training step hands most layers contiguous tensors of many rows. A kernel that takes a pointer for a tensor reads others as
other numbers. The numbers and the pairs of layouts are drawn; the layer runs on its own, and no model needs to run.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.facts import MisreadLayout
from kbitcheck.observe.probes.products import Products

# Up to so many numbers in its weight, a layer costs its dispatch alone, and all of a tiny model's less than its step.
SMALL = 1 << 16
SHAPE = (3, 5)  # of sequences and tokens: no multiple of what kernels take at once

Tensor = torch.Tensor
Layout = Callable[[Tensor, random.Random], Tensor]


def _transposed(x: Tensor, draw: random.Random) -> Tensor:
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _swapped(x: Tensor, draw: random.Random) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _every_other(x: Tensor, draw: random.Random) -> Tensor:
    wide = _drawn((*x.shape[:-1], 2 * x.shape[-1]), draw).to(x)
    wide[..., ::2] = x
    return wide[..., ::2]


def _offset(x: Tensor, draw: random.Random) -> Tensor:
    start = draw.randrange(1, 8, 2)
    flat = _drawn((x.numel() + start,), draw).to(x)
    flat[start:] = x.reshape(-1)
    return flat[start:].view(x.shape)


def _drawn(shape: tuple[int, ...], draw: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(draw.getrandbits(31))
    return torch.rand(shape, generator=generator) - 0.5


LAYOUTS: dict[str, Layout] = {
    "transposed": _transposed,
    "with its first dimensions swapped": _swapped,
    "every other column of a wider one": _every_other,
    "with a storage offset": _offset,
}


@dataclass(frozen=True, slots=True)
class _Demand:
    """What is to come of an input and of a gradient that enters the output, row by row, and how far from it rounding may be."""

    y: Tensor
    y_bound: Tensor
    dx: Tensor
    dx_bound: Tensor

    def broken(self, module: nn.Module, x: Tensor, dy: Tensor) -> str:
        """What is wrong with a layer's results for these numbers, or for the first rows of them; "" if nothing."""
        try:
            y, leaf = _forward(module, x)
            dx = torch.autograd.grad(y, leaf, dy)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it is, the layer takes the same numbers when they are contiguous
            return f"raises {type(error).__name__}: {error}".splitlines()[0]
        return self.missed(y.detach(), dx)

    def missed(self, y: Tensor, dx: Tensor) -> str:
        """What is wrong with an output and with the gradient that left the input; "" if nothing."""
        if y.shape[:-1] != dx.shape[:-1] or y.shape[-1] != self.y.shape[-1]:
            return f"an output of shape {tuple(y.shape)} for an input of shape {tuple(dx.shape)}"
        for what, actual, demanded, bound in (
            ("an output", y, self.y, self.y_bound),
            ("a gradient", dx, self.dx, self.dx_bound),
        ):
            flat = actual.reshape(math.prod(actual.shape[:-1]), actual.shape[-1])
            apart = (flat.double() - demanded[: len(flat)]).abs() / bound[: len(flat)]
            excess = float(apart.nan_to_num(nan=math.inf).max()) if apart.numel() else 0.0
            if excess > 1:
                return f"{what} with an error of {excess:.3g} times its bound"
        return ""


def misread(
    module: nn.Module, weight: Callable[[], Tensor], dtype: torch.dtype | None, seed: int
) -> tuple[MisreadLayout, ...]:
    """What a small layer makes other numbers of, or raises on, that it takes where the same numbers are contiguous.

    ``weight`` gives the layer's, in float64; ``dtype`` is that of its inputs.
    """
    recognition = backends.recognition(module)
    rows, columns = recognition.shape(module)
    if rows * columns > SMALL:
        return ()
    draw, device = random.Random(seed), recognition.packed(module).device  # noqa: S311
    x = _drawn((*SHAPE, columns), draw).to(device, dtype or torch.float32)
    y, leaf = _forward(module, x)
    dy = (_drawn((*SHAPE, rows), draw) / 64).to(device, y.dtype)
    products = Products(module, weight)
    demand = _demand(products, module, x, y.detach(), dy)
    if demand.missed(y.detach(), torch.autograd.grad(y, leaf, dy)[0]):
        return ()  # contiguous numbers, too: a training step shows it
    failures = []
    for name, laid_out, gradient in _pairs(x, dy, draw):
        due = demand
        if 0 in gradient.stride():
            one = products.gradient(gradient, x.dtype)
            due = replace(demand, dx=one.expected, dx_bound=one.bound)
        if actual := due.broken(module, laid_out, gradient):
            own = backends.recognition(module).bare(module)
            failures.append(MisreadLayout(what=name, actual=actual, bare=bool(due.broken(own, laid_out, gradient))))
    return tuple(failures)


def _pairs(x: Tensor, dy: Tensor, draw: random.Random) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each layout of an input with a drawn one of the gradient, and sizes that are edges: what it is, input and gradient."""
    names = list(LAYOUTS)
    for of_input, of_gradient in zip(names, draw.sample(names, len(names)), strict=True):
        laid_out = LAYOUTS[of_input](x, draw), LAYOUTS[of_gradient](dy, draw)
        yield f"an input {of_input}, a gradient {of_gradient}", *laid_out
    yield "one row, a gradient that is one number expanded", x[:1, :1].clone(), dy[0, 0, :1].expand(1, 1, dy.shape[-1])
    yield "no rows", x[0, :0].clone(), dy[0, :0].clone()


def _forward(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output, and the leaf that it took for an input, in the layout of ``x``."""
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        return module(leaf), leaf


def _demand(products: Products, module: Any, x: Tensor, y: Tensor, dy: Tensor) -> _Demand:
    """What the layer returns for contiguous numbers, and the gradient that the chain rule says."""
    magnitudes = products.rounded(x.dtype).double().abs()
    flat = x.reshape(-1, x.shape[-1]).double().abs()
    spread = flat @ magnitudes.T
    if getattr(module, "bias", None) is not None:
        spread += module.bias.detach().double().abs()
    ulp = max(products.ulp(x.dtype), torch.finfo(y.dtype).eps)
    # Each of two outputs is within two ulps and what float32 loses of a sum; what rounds its inputs rounds both alike.
    bound = 2 * (2 * ulp + (x.shape[-1] + 1) * 2.0**-24) * spread + 2 * torch.finfo(y.dtype).tiny
    gradient = products.gradient(dy, x.dtype)
    return _Demand(y.reshape(len(flat), -1).double(), bound, gradient.expected, gradient.bound)
