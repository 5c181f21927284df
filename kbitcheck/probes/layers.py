"""Each quantized layer's own backward, measured from outside it.

Non-zero adapter gradients do not prove flow through a quantized layer, because the residual stream hides a cut; so the
gradient that enters a layer's output and the one that leaves its input are caught, and compared with the product that
the chain rule asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import kbitcheck_reference as oracle
import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.facts import LayerBackward
from kbitcheck.probes import step

_dequantized = oracle.dequantized_weight


def originals(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Each quantized layer's weight in float64, by name, and the layers that the stack itself misreads.

    Where the backend's own kernel unpacks a weight to other numbers than the format says, by more than the rounding of
    its output, what the layer really computes with is the kernel's weight: that one is used, and the relative error
    of the kernel is told.
    """
    weights, misread = {}, {}
    for name, module in model.named_modules():
        if not backends.is_quantized(module):
            continue
        weight = _dequantized(module)
        kernel = backends.dequantized(module).double()
        unpacked = backends.state_dtype(module) or torch.float32
        bound = torch.finfo(unpacked).eps * weight.abs() + torch.finfo(torch.float32).eps * weight.abs().max()
        if bool(((kernel - weight).abs() > bound).any()):
            misread[name] = float((kernel - weight).norm() / weight.norm())
            weight = kernel
        weights[name] = weight
    return weights, misread


class _Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient to a list."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.seen.append(gradient.detach())
        return gradient, None


class _Probe:
    """Taps round one layer. Its hooks run outermost: before every other pre-hook and after every other hook."""

    def __init__(self, module: nn.Module) -> None:
        self.entering: list[torch.Tensor] = []
        self.leaving: list[torch.Tensor] = []
        self.ran = 0
        self.carried = True
        self.dtype: torch.dtype | None = None
        self._passed = False
        self.handles = (
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._after),
        )

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        # Nothing to take a gradient by, or the model itself runs all round the layer without gradients.
        self._passed = not x.is_floating_point() or not torch.is_grad_enabled()
        if self._passed:
            return None
        self.ran += 1
        self.dtype = x.dtype
        if not x.requires_grad:
            x = x.detach().requires_grad_(True)
        tapped = _Tap.apply(x, self.leaving)
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): tapped})

    def _after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if self._passed:
            return output
        if not output.requires_grad:
            self.carried = False
            return output
        tapped: torch.Tensor = _Tap.apply(output, self.entering)
        return tapped


def backwards(
    model: nn.Module,
    batch: step.Batch,
    adapters: Mapping[str, nn.Parameter],
    weights: Mapping[str, torch.Tensor],
    misread: Mapping[str, float],
    autocast: AbstractContextManager[Any] | None = None,
    half: torch.dtype | None = None,
) -> dict[str, LayerBackward]:
    """Run one plain step and judge every quantized layer that took part.

    ``weights`` and ``misread`` are those of ``originals``, read before anything ran; a layer is matched by the end of
    its name, as PEFT wraps models and layers. ``half`` is the dtype that an autocast round the step rounds to.
    """
    modules = {n: m for n, m in model.named_modules() if backends.is_quantized(m)}
    probes = {name: _Probe(module) for name, module in modules.items()}
    try:
        with step.checkpointing_off(model), autocast or nullcontext():
            model.train()
            output = model(**step.feed(model, batch))
        if output.loss.requires_grad:
            output.loss.backward()
    finally:
        for probe in probes.values():
            for handle in probe.handles:
                handle.remove()
        step.clear_gradients(model)
    found = {}
    for name, probe in probes.items():
        if probe.ran:
            known = base_name(name, weights)
            found[name] = _judge(probe, modules[name], weights[known], misread.get(known, 0.0), half)
    return found


def base_name(name: str, known: Any) -> str:
    """The base model's name of a layer that an adapter library wrapped."""
    plain = name.removesuffix(".base_layer")
    while plain not in known and "." in plain:
        plain = plain.partition(".")[2]
    return plain if plain in known else name


def _judge(
    probe: _Probe, module: nn.Module, weight: torch.Tensor, misread: float, half: torch.dtype | None
) -> LayerBackward:
    if not probe.carried:
        return LayerBackward(reached=True, carried=False)
    if not probe.entering:
        return LayerBackward(reached=False, carried=True)
    if len(probe.leaving) != len(probe.entering):
        return LayerBackward(reached=True, carried=False)
    worst, products, squares, rounding = 0.0, 0.0, 0.0, 0.0
    compute = backends.compute_dtype(module) or probe.dtype or torch.float32
    unpacked = backends.state_dtype(module) or compute
    ulp = max(
        torch.finfo(compute).eps,
        torch.finfo(unpacked).eps,
        torch.finfo(probe.dtype or compute).eps,
        torch.finfo(half or compute).eps,
    )
    accumulation = weight.shape[0] * 2.0**-24
    rounded = weight.to(unpacked).to(compute).double()
    for dy, dx in zip(probe.entering, probe.leaving, strict=True):
        flat = dy.reshape(-1, dy.shape[-1]).to(compute).double()
        found = dx.reshape(-1, dx.shape[-1]).double()
        spread = flat.abs() @ weight.abs()
        bound = (3 * ulp + accumulation) * spread + torch.finfo(compute).tiny
        excess = ((found - flat @ weight).abs() / bound).nan_to_num(nan=math.inf)
        worst = max(worst, float(excess.max()) if found.numel() else 0.0)
        # The gain is taken against operands rounded as the kernel rounds them: only the result's own rounding is left.
        expected = flat @ rounded
        products += float((found * expected).sum())
        squares += float(expected.square().sum())
        rounding += float((spread * expected.abs()).sum())
    gain = products / squares if squares else 1.0
    return LayerBackward(
        reached=True,
        carried=True,
        excess=worst,
        gain=gain,
        misread=misread,
        gain_bound=ulp + accumulation * rounding / squares if squares else 1.0,
    )
