"""Float twins: the base with every quantized layer replaced by its unpacked weights, read before anything ran."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from kbitcheck import backends
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import Gap
from kbitcheck.core.profile import PROMISES
from kbitcheck.observe.probes import step
from kbitcheck.observe.probes.experts import TwinStack
from kbitcheck.observe.probes.gap import gap
from kbitcheck.observe.probes.layers import Empty, Read, Weights
from kbitcheck.observe.probes.snapshot import norm_evidence
from kbitcheck.observe.twin.wide_parameter import Unpacked, Widened

# A parameter that would be larger than this is widened when it is used, which takes a small one longer than its arithmetic.
LARGE_BYTES = 16 << 20
HALVES = (torch.float16, torch.bfloat16)
# Below these a product of halves takes milliseconds at most, and its bits are worth them.
MANY_ROWS, MANY_WEIGHTS = 64, 1 << 16

Round = Callable[[torch.Tensor], torch.Tensor]


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias`` in ``dtype``; forward and backward each read the weight anew, so that the graph holds none.

    The weight is unpacked to ``backward_dtype``, in which the backward computes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dtype: torch.dtype,
        backward_dtype: torch.dtype,
        weight: Read,
        backward_weight: Read,
        bias: torch.Tensor | None,
        rounded: Round,
        apart: bool,
    ) -> Any:
        ctx.weight, ctx.dtype, ctx.entered = backward_weight, backward_dtype, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x, unpacked = rounded(x.to(dtype)), weight().to(backward_dtype).to(dtype)
        if bias is None or apart:
            product = linear(x, unpacked)
            return product if bias is None else product + bias.to(dtype)
        return linear(x, unpacked, bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        product = _product(gradient.to(ctx.dtype), ctx.weight().to(ctx.dtype))
        # As bitsandbytes sums it: over the first dimension in the bias's dtype; autograd sums over the others.
        bias = gradient.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[5] else None
        return product.to(ctx.entered), None, None, None, None, bias, None, None


def sums_apart(rows: int, weights: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the twin sums a backward's product in float32 and rounds it once: one of many numbers of half precision on a CPU.

    A CPU's own kernels sum so, too, but in another order; without units for halves they take up to fifty times as long.
    """
    return dtype in HALVES and device.type == "cpu" and rows >= MANY_ROWS and weights >= MANY_WEIGHTS


def _product(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if sums_apart(gradient.shape[:-1].numel(), weight.numel(), gradient.dtype, gradient.device):
        return (gradient.float() @ weight.float()).to(gradient.dtype)
    return gradient @ weight


class TwinLinear(nn.Linear):
    """A quantized layer's arithmetic with a plain weight: computes in ``compute``, returns the input's dtype.

    Without ``compute`` it computes in the dtype that ``follows`` gives for an input, and returns that. ``read`` gives the
    weight, (out, in) in ``compute`` (None: float32), ``backward_read`` that of a backward which unpacks to another dtype.
    ``rounded`` rounds the input as the kernel does, but not the gradient. ``weight`` has no numbers of its own: who reads it,
    as DoRA does, gets what ``backward_read`` gives.
    """

    def __init__(
        self,
        layer: Any,
        read: Read,
        compute: torch.dtype | None,
        backward_read: Read,
        rounded: Round,
        follows: Callable[[torch.Tensor], torch.dtype],
    ) -> None:
        recognition = backends.recognition(layer)
        rows, columns = recognition.shape(layer)
        super().__init__(columns, rows, bias=False, device="meta")
        device = recognition.packed(layer).device
        like = torch.zeros((), dtype=compute or torch.float32, device=device).expand(rows, columns)
        self.weight = nn.Parameter(Unpacked(like, backward_read), requires_grad=False)
        if layer.bias is not None:
            bias = layer.bias.detach().to(compute or layer.bias.dtype, copy=True)
            self.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
        self.compute = compute
        self._read, self._backward_read = read, backward_read
        self._rounded, self._follows = rounded, follows
        self._apart = backends.arithmetic(layer).adds_bias_apart(layer)
        self.exact_kernel = backends.arithmetic(layer).multiplies_unpacked

    def reset_parameters(self) -> None:
        """Draw nothing: the weight is the layer's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute or self._follows(x)
        own: torch.Tensor | None = self._parameters["bias"]
        if sums_apart(x.shape[:-1].numel(), self.weight.numel(), self.compute or x.dtype, x.device):
            self.exact_kernel = False
        with torch.autocast(x.device.type, enabled=False):
            product: torch.Tensor = _Product.apply(
                x, dtype, self.compute or x.dtype, self._read, self._backward_read, own, self._rounded, self._apart
            )
        return product.to(x.dtype) if self.compute else product


def has_bits_of(twin: nn.Module) -> bool:
    """Whether the products of a same-dtype twin have the bits of its model's, on a CPU."""
    return all(layer.exact_kernel for layer in twin.modules() if isinstance(layer, TwinLinear))


def compute_dtypes(twin: nn.Module) -> set[torch.dtype]:
    """The dtypes in which quantized layers of its model compute, whatever their inputs."""
    return {layer.compute for layer in twin.modules() if isinstance(layer, TwinLinear) and layer.compute is not None}


def float64(base: nn.Module, weights: Weights) -> nn.Module:
    """The float64 twin of a base, which is left alone; ``weights`` are the quantized layers', by name."""

    def plain(name: str, layer: Any) -> nn.Module:
        if not backends.recognition(layer).multiplies(layer):
            return TwinStack(weights.stack(name))
        read = partial(weights.exact, name)
        return TwinLinear(layer, read, torch.float64, read, lambda x: x, lambda x: torch.float64)

    twin: Any = _replaced(base, plain, lambda name, module: torch.float64)
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # the grouped product knows no float64
    doubled: nn.Module = twin.double()
    return doubled


def same_dtype(base: nn.Module, weights: Weights, profile: str) -> nn.Module:
    """The twin of a base that rounds as an ideal preparation under ``profile`` must; the base is left alone."""

    def plain(name: str, layer: Any) -> nn.Module:
        arithmetic = backends.arithmetic(layer)
        if not backends.recognition(layer).multiplies(layer):
            dtype = promised(profile, name, layer) or arithmetic.unpacked_dtype(layer) or torch.float32
            return TwinStack(weights.stack(name, partial(_unpacked, dtype=dtype)))
        compute, backward = arithmetic.compute_dtype(layer), arithmetic.unpacked_dtype(layer)
        # Where the layer follows its input, its kernel's arithmetic is float32, rounded as the kernel rounds.
        read = weights.reader(name, partial(_unpacked, dtype=compute or torch.float32))
        backward_read = read
        if compute is not None and backward not in (None, compute):
            backward_read = weights.reader(name, partial(_unpacked, dtype=backward))
        rounded, follows = partial(arithmetic.round_input, layer), partial(arithmetic.product_dtype, layer)
        return TwinLinear(layer, read, compute, backward_read, rounded, follows)

    twin = _replaced(base, plain, partial(promised, profile))
    cast(twin, profile)
    return twin


def _unpacked(layer: Any, empty: Empty, dtype: torch.dtype) -> torch.Tensor:
    """As the kernel unpacks: scales that are themselves quantized round once more than the format says."""
    wide = backends.arithmetic(layer).unpacked(layer, torch.float32)
    # Used memory is copied to, too: fresh memory that lives as long as a product does leaves the heap in pieces.
    fresh = empty is torch.empty
    return wide if fresh and dtype == wide.dtype else empty(wide.shape, dtype=dtype, device=wide.device).copy_(wide)


def promised(profile: str, name: str, module: nn.Module) -> torch.dtype | None:
    """The dtype that ``profile`` promises of a module's half-precision parameters; None where it promises nothing."""
    return torch.float32 if PROMISES[profile].casts(norm=bool(norm_evidence(name, module))) else None


def cast(model: nn.Module, profile: str) -> None:
    """Cast, in place, what is not quantized as ``profile`` promises."""
    for name, module in model.named_modules():
        packed = isinstance(module, (TwinLinear, TwinStack)) or backends.is_quantized(module)
        if not packed and promised(profile, name, module):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype in HALVES:
                    parameter.data = parameter.data.float()


def _replaced(
    model: nn.Module, build: Callable[[str, Any], nn.Module], wide: Callable[[str, nn.Module], torch.dtype | None]
) -> nn.Module:
    """A copy of a model with its quantized layers replaced; nothing packed and no large parameter is copied.

    ``wide`` gives the dtype in which a module's parameters compute: large ones are read from ``model`` in that.
    """
    instead: dict[int, Any] = {}
    for name, module in model.named_modules():
        # Tables of hooks, a dozen a module, are what copying a block costs.
        empty = (table for table in vars(module).values() if type(table) is OrderedDict and not table)
        instead.update((id(table), OrderedDict()) for table in empty)
        if backends.is_quantized(module):
            instead[id(module)] = build(name, module)
        elif dtype := wide(name, module):
            for parameter in module.parameters(recurse=False):
                narrower = parameter.is_floating_point() and parameter.dtype.itemsize < dtype.itemsize
                if narrower and parameter.numel() * dtype.itemsize > LARGE_BYTES:
                    widened = Widened(parameter.detach(), dtype)
                    instead[id(parameter)] = nn.Parameter(widened, requires_grad=False)
    return copy.deepcopy(model, instead)


@dataclass(frozen=True)
class Pair:
    """Gradients of one batch: ``exact`` of the float64 twin, ``rounded`` of the twin in the preparation's own dtypes."""

    exact: step.Gradients
    rounded: step.Gradients

    @cached_property
    def yardsticks(self) -> Mapping[str, float]:
        """Relative distance of ``rounded`` from ``exact`` for each live adapter, at least one ulp.

        Adapters whose exact gradient is not finite, as with some models' masks, have none: no bound follows from it.
        """
        ulp = float(torch.finfo(torch.float32).eps)
        apart = {n: step.distance(g, self.exact[n]) for n, g in self.rounded.items() if live(self.exact[n])}
        return {n: max(distance, ulp) for n, distance in apart.items() if math.isfinite(distance)}

    @property
    def median_yardstick(self) -> float:
        """The median over adapters with a gradient."""
        return median(self.yardsticks.values()) if self.yardsticks else 0.0

    def beside(self, gradients: step.Gradients) -> dict[str, Gap]:
        """Each adapter's gradient beside the twins'."""
        return {n: gap(gradient, self.exact[n], self.rounded[n]) for n, gradient in gradients.items()}


@dataclass(frozen=True, slots=True)
class Twins:
    """Gradients of one base's twins, of the whole batch and of one row without a mask."""

    whole: Pair
    single: Pair


def require_numbers(*losses: float) -> None:
    """Raise ``Unavailable``, as a failure, if a twin's loss is no number: nothing can be judged by such a twin."""
    if any(map(math.isnan, losses)):
        raise Unavailable("the loss of the float twin is not a number, so that it says nothing", failed=True)


def live(gradient: torch.Tensor | None) -> bool:
    """Whether an adapter's gradient is there and not zero."""
    return gradient is not None and bool(gradient.any())


def root_mean_square_error(actual: torch.Tensor, exact: torch.Tensor, keep: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values, over the tokens kept; row by row."""
    apart, size = 0.0, 0.0
    for mine, theirs, kept in zip(actual, exact, keep, strict=True):
        apart = math.hypot(apart, float((mine[kept].double() - theirs[kept]).norm()))
        size = math.hypot(size, float(theirs[kept].norm()))
    return apart / size if size else 0.0
