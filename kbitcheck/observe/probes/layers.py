"""Each quantized layer's own backward, measured from outside it.

Non-zero adapter gradients do not prove flow through a quantized layer, because the residual stream hides a cut. So the
gradients at a layer's output and input are compared with the product that the chain rule demands.
"""

import math
from collections.abc import Callable, Container
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, Self

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.facts import LayerBackward
from kbitcheck.observe import internals
from kbitcheck.observe.probes import experts, layouts, step, switches
from kbitcheck.observe.probes.products import Products
from kbitcheck.observe.probes.tap import Tap

# Up to here the unpacked weights of a whole model are kept; unpacking them anew each time costs a tiny model more
# than all its arithmetic, and keeping those of a large one eight bytes a weight.
KEPT_BYTES = 256 << 20

# What gradients are multiplied by: a power of two, which rounds nothing, and no more than fp16 holds of their products.
LARGE = 4096.0

Read = Callable[[], torch.Tensor]
Empty = Callable[..., torch.Tensor]  # as ``torch.empty``
Unpack = Callable[[Any, Empty], torch.Tensor]  # a layer's weight, in memory that the second one gives


class Weights:
    """Each quantized layer's weight, (out, in), by name, unpacked from layers of a model that never runs.

    A layer computes with the weight that the backend's own kernel unpacks: where that differs from the format by more
    than the rounding of the output, it is used; ``misread`` has the relative errors of those.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, Any] = dict(backends.holders(model))
        self.owners = experts.owners(model)
        self.misread: dict[str, float] = {}
        elements = [math.prod(backends.recognition(layer).shape(layer)) for layer in self.layers.values()]
        self._all_kept = 8 * sum(elements) <= KEPT_BYTES
        self._kept: dict[str, torch.Tensor] = {}
        self._kernels: dict[str, torch.Tensor] = {}
        self._scratches: dict[torch.dtype, torch.Tensor] = {}
        for name, layer in self.layers.items():
            arithmetic = backends.arithmetic(layer)
            shape, device = backends.recognition(layer).shape(layer), _device(layer)
            weight = arithmetic.exact(layer, self._scratch(shape, dtype=torch.float64, device=device))
            # In float32: what a forward in another dtype than the state's unpacks to was not rounded to the state's.
            kernel = arithmetic.unpacked(layer, torch.float32)
            if _far(kernel, weight, arithmetic.unpacked_dtype(layer) or torch.float32):
                self.misread[name] = float((kernel - weight).norm() / weight.norm())
                self._kernels[name] = kernel
        if self._all_kept:
            self._scratches.clear()

    def exact(self, name: str) -> torch.Tensor:
        """The layer's weight in float64: that of a large model in memory that the next one is unpacked to as well."""
        if name in self._kept:
            return self._kept[name]
        layer = self.layers[name]
        if name not in self._kernels and not self._all_kept:
            shape, device = backends.recognition(layer).shape(layer), _device(layer)
            return backends.arithmetic(layer).exact(layer, self._scratch(shape, dtype=torch.float64, device=device))
        weight = self._kernels[name].double() if name in self._kernels else backends.arithmetic(layer).exact(layer)
        if self._all_kept:
            self._kept[name] = weight
        return weight

    def stack(self, name: str, unpack: Unpack | None = None) -> Read:
        """A weight that stays after the next one is unpacked, as what is read into a graph must; by default in float64."""
        layer = self.layers[name]
        if unpack is not None:
            return cache(partial(unpack, layer, torch.empty)) if self._all_kept else partial(unpack, layer, torch.empty)
        if name in self._kernels or self._all_kept:
            return partial(self.exact, name)
        return partial(backends.arithmetic(layer).exact, layer)

    def reader(self, name: str, unpack: Unpack) -> Read:
        """The layer's weight as ``unpack`` makes it: of a small model once, of a large one anew each time in the same memory."""
        layer = self.layers[name]
        return cache(partial(unpack, layer, torch.empty)) if self._all_kept else partial(unpack, layer, self._scratch)

    def _scratch(self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory that was used before: the page faults of fresh memory take longer than unpacking into it."""
        count = math.prod(shape)
        held = self._scratches.get(dtype)
        if held is None or held.numel() < count:
            held = self._scratches[dtype] = torch.empty(count, dtype=dtype, device=device)
        return held[:count].view(shape)


def _device(layer: nn.Module) -> torch.device:
    return backends.recognition(layer).packed(layer).device


def _far(kernel: torch.Tensor, weight: torch.Tensor, unpacked: torch.dtype) -> bool:
    """Whether any element of what a kernel unpacked is off by more than the rounding of its dtype and of float32."""
    single = weight.float()
    nearly = 0.99 * torch.finfo(torch.float32).eps * float(single.abs().max())
    # Which most are, and which is seen in float32: what that rounds is less than what is allowed beside ``nearly``.
    if float(single.sub_(kernel).abs_().max()) <= nearly:
        return False
    magnitudes, own = weight.abs(), torch.finfo(unpacked)
    # Below its normal numbers a dtype's steps are all alike: rounding loses half of one, however small the number.
    allowed = torch.finfo(torch.float32).eps * magnitudes.max() + own.eps * magnitudes + own.eps * own.tiny / 2
    return bool(((kernel - weight).abs_() > allowed).any())


class _Probe:
    """Taps around one layer, whose backward is judged as it happens, so that no gradient is kept. Its hooks are outermost.

    ``weight`` gives the layer's, in float64; ``half`` is the dtype to which an autocast around the step rounds. ``dtype``
    is that of the input, None until the layer runs. An input that requires no grad is made to, or with ``leave`` sets ``missed``.
    """

    def __init__(self, module: nn.Module, weight: Read, half: torch.dtype | None, *, leave: bool = False) -> None:
        self.dtype: torch.dtype | None = None
        self.missed = False
        self._module, self._leave, self._of = module, leave, Products(module, weight, half)
        self._hooked = False
        self._entered, self._left, self._carried, self._passed = 0, 0, True, False
        self._waiting: list[torch.Tensor] = []
        self._excess = self._products = self._squares = self._rounding = 0.0

    def attach(self, hooks: ExitStack) -> None:
        """Put the hooks on the layer, until ``hooks`` closes."""
        hooks.enter_context(self._module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True))
        hooks.enter_context(self._module.register_forward_hook(self._after))
        # Such hooks change the gradient before the tap on the output sees it.
        self._hooked = internals.has_backward_pre_hooks(self._module)
        if self._hooked:
            hooks.enter_context(self._module.register_full_backward_pre_hook(self._enters_hooks, prepend=True))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        # Integers have no gradient, and some models run such layers without gradients themselves.
        self._passed = not x.is_floating_point() or not torch.is_grad_enabled()
        if self._passed:
            return None
        self.dtype = x.dtype
        if not x.requires_grad:
            if self._leave:
                self.missed = self._passed = True
                return None
            x = x.detach().requires_grad_(True)
        tapped = Tap.apply(x, self._leaves)
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): tapped})

    def _after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if self._passed:
            return output
        if not output.requires_grad:
            self._carried = False
            return output
        tapped: torch.Tensor = Tap.apply(output, self._enters)
        return tapped

    def _enters(self, gradient: torch.Tensor) -> None:
        self._entered += 1
        if not self._hooked:
            self._waiting.append(gradient)

    def _enters_hooks(self, module: nn.Module, gradients: Any) -> None:
        self._waiting.append(gradients[0])

    def _leaves(self, gradient: torch.Tensor) -> None:
        self._left += 1
        if self._waiting:
            self._judge(self._waiting.pop(0), gradient)

    def _judge(self, dy: torch.Tensor, dx: torch.Tensor) -> None:
        product = self._of.gradient(dy, self.dtype)
        actual = dx.reshape(-1, dx.shape[-1]).double()
        excess = ((actual - product.expected).abs() / product.bound).nan_to_num(nan=math.inf)
        self._excess = max(self._excess, float(excess.max()) if actual.numel() else 0.0)
        self._products += float((actual * product.expected).sum())
        self._squares += float(product.expected.square().sum())
        self._rounding += float((product.spread * product.expected.abs()).sum())

    def result(self, misread: float) -> LayerBackward:
        """Facts of the layer's backward; ``misread`` is the relative error of its kernel."""
        if self._carried and not self._entered:
            return LayerBackward(reached=False, carried=True)
        if not self._carried or self._left != self._entered or self._waiting:
            return LayerBackward(reached=True, carried=False)
        squares, ulp = self._squares, self._of.ulp(self.dtype)
        return LayerBackward(
            reached=True,
            carried=True,
            excess=self._excess,
            gain=self._products / squares if squares else 1.0,
            misread=misread,
            gain_bound=ulp + self._of.accumulation * self._rounding / squares if squares else 1.0,
        )


class Probes:
    """Probes of every quantized layer of a model in one step that runs while the context is open.

    ``half`` is the dtype to which an autocast around the step rounds. With ``leave`` the graph of the step is its own: a layer
    whose input requires no grad is not judged.
    """

    def __init__(
        self, model: nn.Module, weights: Weights, half: torch.dtype | None = None, *, leave: bool = False
    ) -> None:
        self._weights = weights
        self._modules = dict(backends.quantized_layers(model))
        self._probes = {
            n: _Probe(m, partial(weights.exact, base_name(n, weights.layers)), half, leave=leave)
            for n, m in self._modules.items()
        }
        self._experts = dict(experts.probes(model, weights, leave=leave))
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        taps: list[Any] = [*self._probes.values(), *self._experts.values()]
        for probe in taps:
            probe.attach(self._hooks)
        return self

    def __exit__(self, *raised: object) -> None:
        self._hooks.close()

    @property
    def complete(self) -> bool:
        """Whether every layer that ran was judged."""
        return not any(probe.missed for probe in self._probes.values())

    def results(self, *, seed: int | None = None) -> dict[str, LayerBackward]:
        """The backward of every layer that took part; with a seed, of other inputs and gradients than the step's too."""
        results = {}
        for name, probe in self._probes.items():
            if probe.dtype is not None:
                judged = probe.result(self._weights.misread.get(base_name(name, self._weights.layers), 0.0))
                if seed is not None:
                    judged = replace(judged, **self._alone(name, seed))
                results[name] = judged
        of_experts = ((f"{name} (experts)", probe.result()) for name, probe in self._experts.items())
        return results | {name: result for name, result in of_experts if result is not None}

    def _alone(self, name: str, seed: int) -> dict[str, Any]:
        """What a layer's backward makes, outside the step, of gradients and layouts that no step hands it."""
        module, dtype, base = self._modules[name], self._probes[name].dtype, base_name(name, self._weights.layers)
        extremes = _extremes(module, dtype)
        if not math.isfinite(extremes["bent"]):
            return extremes
        return {**extremes, "layouts": layouts.misread(module, partial(self._weights.exact, base), dtype, seed)}


def backwards(
    model: nn.Module,
    batch: step.Batch,
    weights: Weights,
    autocast: step.Autocast = nullcontext,
    half: torch.dtype | None = None,
    *,
    seed: int | None = None,
) -> dict[str, LayerBackward]:
    """The results of probes in a plain step of its own; ``half`` is the dtype to which ``autocast`` rounds."""
    with ExitStack() as after, Probes(model, weights, half) as probes:
        after.callback(step.clear_gradients, model)
        with switches.checkpointing_off(model), autocast():
            model.train()
            output = model(**step.feed(model, batch))
        # Without labels the caller has a loss of its own; a square keeps every logit's gradient apart.
        loss = output.logits.float().square().mean() / 2 if output.loss is None else output.loss
        if loss.requires_grad:
            loss.backward()
    return probes.results(seed=seed)


def _extremes(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    """The layer's backward of gradients far larger than a step's, as gradient scalers make them, one of them infinite."""
    recognition = backends.recognition(module)
    (rows, columns), device = recognition.shape(module), recognition.packed(module).device
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, columns, generator=draw).to(device, dtype or torch.float32).requires_grad_(True)
    y = module(x)
    dy = (torch.rand(2, rows, generator=draw) - 0.5).to(device, y.dtype) / 64
    far = LARGE * dy
    far[1, 0] = math.inf
    if not y.requires_grad:
        return {"bent": math.inf}
    (small,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (large,) = torch.autograd.grad(y, x, far)
    size = small[0].double().norm().clamp(min=1e-300)
    gap = (large[0].double() / LARGE - small[0].double()).norm() / size
    compute = backends.arithmetic(module).compute_dtype(module) or small.dtype
    limits = max(map(torch.finfo, (small.dtype, compute)), key=lambda f: f.eps)
    return {
        "bent": float(gap.nan_to_num(nan=math.inf)),
        # Beside the dtype's own rounding, what it cannot hold of the smallest numbers.
        "bent_bound": limits.eps + float(limits.tiny * limits.eps * columns**0.5 / size),
        "overflows": not bool(torch.isfinite(large[1]).all()),
    }


def base_name(name: str, names: Container[str]) -> str:
    """The base model's name of a layer that an adapter library wrapped."""
    plain = name.removesuffix(".base_layer")
    while plain not in names and "." in plain:
        plain = plain.partition(".")[2]
    return plain if plain in names else name
