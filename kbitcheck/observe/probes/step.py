"""One training step, watched: which blocks ran when, what reached torch's checkpoint, which gradients came out."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from kbitcheck.core.facts import BlockFacts, Distance, RunFacts
from kbitcheck.observe.probes import digest
from kbitcheck.observe.probes.live import tensors
from kbitcheck.observe.probes.snapshot import is_block, tower

Batch = Mapping[str, torch.Tensor]
Gradients = dict[str, torch.Tensor | None]


class Step(NamedTuple):
    """One training step: its facts, and copies of the adapters' gradients by name."""

    facts: RunFacts
    gradients: Gradients


# Bound before any subject is imported, which may patch them.
_REENTRANT = torch_checkpoint.CheckpointFunction
_NON_REENTRANT = torch_checkpoint._checkpoint_without_reentrant_generator
CHECKPOINT = torch_checkpoint.checkpoint


@dataclass(slots=True)
class _Block:
    """What one block did in one step."""

    forward: Counter[int] = field(default_factory=Counter)
    backward: Counter[int] = field(default_factory=Counter)
    marker: int | None = None
    input_requires_grad: bool | None = None
    without_grad: int = 0
    on_path: bool = False


def feed(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch with sounds and images in the dtype of the convolution that reads them, as a data loader's cast does."""
    reader = next((p.dtype for p in model.parameters() if p.dim() >= 3 and p.is_floating_point()), None)
    return {k: v.to(reader) if reader and v.is_floating_point() else v for k, v in batch.items()}


class Watch:
    """Hooks on every block and everything inside it, for one step. ``phase`` is ``forward`` or ``backward``.

    Runs of a block are counted on a module inside it: transformers 5 checkpoints ``forward``, so hooks on the block
    itself fire once; 4.56 checkpoints ``__call__``; and a non-reentrant recompute stops early and skips post hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.phase = "forward"
        self.order: list[str] = []
        self.blocks = {name: _Block() for name, module in model.named_modules() if is_block(module)}
        self.readers: dict[int, set[str]] = {}
        self.turned: set[str] = set()
        self.entered: Counter[str] = Counter()
        self.branching: set[str] = set()
        self._inputs: list[tuple[str, Any, int]] = []
        self._last: dict[str, int] = {}
        self._kept: list[torch.Tensor] = []
        self._handles: list[Any] = []
        for name in self.blocks:
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._entered(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._left(name)))
            for inner in list(module.modules())[1:]:
                self._handles.append(inner.register_forward_pre_hook(self._ran(name)))

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._kept.clear()
        self._inputs.clear()

    def follow(self, loss: torch.Tensor) -> None:
        """See which blocks' inputs something after the block reads too: taps on hidden states, for one."""
        readers: dict[tuple[Any, int], list[int]] = {}
        seen, todo = {loss.grad_fn}, [loss.grad_fn]
        while todo:
            node: Any = todo.pop()
            for source, number in node.next_functions if node is not None else ():
                readers.setdefault((source, number), []).append(node._sequence_nr())
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        for name, source, number in self._inputs:
            # Nodes are numbered as they are made: what a block makes comes before the end of its output.
            inside = [nr <= self._last.get(name, -1) for nr in readers.get((source, number), ())]
            if any(inside) and not all(inside):
                self.branching.add(name)

    def _entered(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.phase != "forward":
                return
            block = self.blocks[name]
            floating = [t for t in tensors(args, kwargs) if t.is_floating_point()]
            block.without_grad += not torch.is_grad_enabled()
            self.entered[name] += torch.is_grad_enabled()
            if floating:  # a block may run several times in a step, some of them without gradients
                block.input_requires_grad = bool(block.input_requires_grad) or floating[0].requires_grad
            for tensor in floating:
                if tensor.requires_grad:
                    if tensor.grad_fn is not None:
                        self._inputs.append((name, tensor.grad_fn, tensor.output_nr))
                    self._kept.append(tensor)
                    self.readers.setdefault(id(tensor), set()).add(name)
                    if not tensor.is_contiguous():
                        self.turned.add(name)

        return hook

    def _left(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            def reached(gradient: torch.Tensor) -> None:
                self.blocks[name].on_path = True

            for tensor in tensors(output):
                if tensor.grad_fn is not None and self.phase == "forward":
                    self._last[name] = max(self._last.get(name, -1), tensor.grad_fn._sequence_nr())
                if tensor.requires_grad:
                    tensor.register_hook(reached)

        return hook

    def _ran(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            block = self.blocks[name]
            if block.marker is None:
                block.marker = id(module)
            if id(module) != block.marker:
                return
            if self.phase == "forward":
                block.forward[id(module)] += 1
            else:
                block.backward[id(module)] += 1
                self.order.append(name)

        return hook

    def facts(self) -> dict[str, BlockFacts]:
        """What each block did."""
        return {
            name: BlockFacts(
                name=name,
                tower=tower(name),
                computed=sum(block.forward.values()),
                recomputed=sum(block.backward.values()),
                without_grad=block.without_grad,
                on_path=block.on_path,
                input_requires_grad=block.input_requires_grad,
            )
            for name, block in self.blocks.items()
        }

    @property
    def inexact(self) -> tuple[str, ...]:
        """Blocks whose gradients round otherwise when they are checkpointed, or gathered.

        Those of an input that is read elsewhere too are added up in another order, and so are those of a block that
        runs several times. Those of an input whose rows are not contiguous take its layout (it is a leaf then), and
        kernels pick their order by layout.
        """
        shared = (name for names in self.readers.values() if len(names) > 1 for name in names)
        return tuple(
            sorted(
                {*shared, *self.branching, *self.turned, *(name for name, times in self.entered.items() if times > 1)}
            )
        )


@contextmanager
def checkpoint_spies() -> Iterator[list[dict[str, str]]]:
    """Record the arguments of each call that reaches torch's checkpoint, in both modes."""
    calls: list[dict[str, str]] = []
    signature = inspect.signature(_NON_REENTRANT)

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: Any, *args: Any) -> Any:
            calls.append({"use_reentrant": "True", "preserve_rng_state": str(preserve)})
            return _REENTRANT.apply(function, preserve, *args)

    def non_reentrant(function: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(function, *args, **kwargs)
        bound.apply_defaults()
        named = {
            k: str(v) for k, v in bound.arguments.items() if k in ("preserve_rng_state", "determinism_check", "debug")
        }
        calls.append({"use_reentrant": "False", **named})
        return _NON_REENTRANT(function, *args, **kwargs)

    saved = torch_checkpoint.CheckpointFunction, torch_checkpoint._checkpoint_without_reentrant_generator
    torch_checkpoint.CheckpointFunction = Reentrant  # type: ignore[assignment, misc]
    torch_checkpoint._checkpoint_without_reentrant_generator = non_reentrant  # type: ignore[assignment]
    try:
        yield calls
    finally:
        torch_checkpoint.CheckpointFunction, torch_checkpoint._checkpoint_without_reentrant_generator = saved  # type: ignore[misc]


@contextmanager
def checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The plain run: every checkpointing flag off, restored afterwards.

    Where one was on the cache is off too, as a checkpointed forward has none: it lays keys and values out in another
    way, and BLAS then adds in another order.
    """
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with cache_off(model) if on else nullcontext():
            yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def cache_off(model: nn.Module) -> Iterator[None]:
    """No key/value cache, as transformers' Trainer trains; the configurations are restored afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    caching: list[Any] = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def checkpointing_switched(model: nn.Module, *, use_reentrant: bool) -> Iterator[None]:
    """The same blocks under the other mode; their inputs are made to require grad, as reentrant checkpointing needs."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    before = [m.__dict__.get("_gradient_checkpointing_func") for m in on]

    def checkpoint(function: Any, *args: Any) -> Any:
        floating = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if floating and not any(t.requires_grad for t in args if isinstance(t, torch.Tensor)):
            floating[0].requires_grad_(True)
        return CHECKPOINT(function, *args, use_reentrant=use_reentrant)

    for module in on:
        module._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, function in zip(on, before, strict=True):
            if function is None:
                del module._gradient_checkpointing_func
            else:
                module._gradient_checkpointing_func = function


def quietly(function: Callable[[], Any]) -> None:
    """Call a transformers method whose deprecation is not the subject's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function()


@contextmanager
def dropout_raised(model: nn.Module, p: float = 0.1) -> Iterator[None]:
    """Give every dropout of the built model a rate, and afterwards the one it had."""
    changed = set_dropout(model, p)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def set_dropout(model: nn.Module, p: float) -> list[tuple[nn.Module, str, float]]:
    """Give every dropout of the built model a rate, modules and rates kept as plain numbers alike; returns what was."""
    found: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found.append((module, "p", module.p))
        found.extend(
            (module, name, value)
            for name, value in vars(module).items()
            if "dropout" in name and isinstance(value, float) and "layer" not in name
        )
    for module, name, _ in found:
        setattr(module, name, p)
    return found


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """A private random state, so that a probe draws nothing from the user's."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def train_step(
    model: nn.Module,
    batch: Batch,
    adapters: Mapping[str, nn.Parameter],
    *,
    seed: int = 0,
    autocast: AbstractContextManager[Any] | None = None,
    watch: bool = True,
    gathered: Gradients | None = None,
) -> Step:
    """One forward and backward in train mode. Leaves no gradient.

    ``gathered`` are gradients of earlier steps that this one adds to, as in gradient accumulation.
    """
    clear_gradients(model)
    for name, gradient in (gathered or {}).items():
        adapters[name].grad = gradient
    model.train()
    watcher = Watch(model) if watch else None
    device = str(next(iter(batch.values())).device)
    with (
        seeded(seed, device),
        checkpoint_spies() as calls,
        warnings.catch_warnings(record=True) as heard,
    ):
        warnings.simplefilter("always")
        try:
            with autocast or nullcontext():
                output = model(**feed(model, batch))
            loss = output.loss
            if watcher:
                watcher.follow(loss)
                watcher.phase = "backward"
            if loss.requires_grad:
                loss.backward()
        finally:
            if watcher:
                watcher.remove()
    owned = {id(p) for p in adapters.values()}
    base = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in owned]
    grads: Gradients = {n: None if p.grad is None else p.grad.detach().clone() for n, p in adapters.items()}
    clear_gradients(model)
    cache = getattr(output, "past_key_values", None)
    facts = RunFacts(
        loss=float(loss.detach()),
        loss_bits=digest.bits(loss),
        grads={n: None if g is None else digest.bits(g) for n, g in grads.items()},
        blocks=watcher.facts() if watcher else {},
        order=tuple(watcher.order) if watcher else (),
        checkpoints=tuple(calls),
        warnings=tuple(f"{w.category.__name__}: {w.message}".splitlines()[0] for w in heard),
        cache_held=cache is not None and any(True for _ in _cached(cache)),
        inexact=watcher.inexact if watcher else (),
        base_grads=tuple(base),
    )
    return Step(facts, grads)


def _cached(cache: Any) -> Iterator[torch.Tensor]:
    """Tensors that a key/value cache holds, in either of its forms."""
    if isinstance(cache, (tuple, list)):
        yield from tensors(cache)
    for part in (cache, getattr(cache, "self_attention_cache", None)):
        for layer in getattr(part, "layers", None) or ():
            yield from (t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)


def clear_gradients(model: nn.Module) -> None:
    """Drop every gradient, as ``zero_grad`` does, without relying on the model's own method."""
    for parameter in model.parameters():
        parameter.grad = None


def distance(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Relative Frobenius distance; a missing tensor is zero, and infinitely far from one that is not."""
    if found is None or expected is None:
        return 0.0 if equal(found, expected) else math.inf
    wide, target = found.double(), expected.double()
    norm = float(target.norm())
    gap = float((wide - target).norm())
    return gap / norm if norm else (0.0 if gap == 0 else math.inf)


def distances(found: Gradients, expected: Gradients, yardsticks: Mapping[str, float]) -> dict[str, Distance]:
    """Each gradient against its counterpart, beside its yardstick."""
    return {
        name: Distance(
            equal=equal(gradient, expected[name]),
            relative=distance(gradient, expected[name]),
            yardstick=yardsticks.get(name, 0.0),
        )
        for name, gradient in found.items()
    }


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two gradients have the same bits; a missing one is zero, as checkpointing may leave it either way."""
    if a is None or b is None:
        return not any(bool(t.any()) for t in (a, b) if t is not None)
    return a.dtype == b.dtype and torch.equal(a, b)
