"""What a training step holds, and what preparing costs, in bytes of storages alive."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.facts import CostFacts, MemoryFacts
from kbitcheck.models.blocks import is_block
from kbitcheck.observe import internals
from kbitcheck.observe.garbage import only_new_garbage
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.live import EXISTING, Live, own_tensors, tensors
from kbitcheck.observe.probes.parts import parts

OUTSIDE = ""  # the tag of what no block makes
_Inputs = dict[str, tuple[nn.Module, torch.Size, torch.dtype]]


@dataclass(slots=True)
class Held:
    """Bytes of one step: ``held`` after its forward, ``survivors`` after all of it, ``outside`` made by no block.

    ``crossing`` is handed into or out of blocks, each storage once: ``added`` to it from one entry to the next. ``entries``
    is what was alive when each block was entered.
    """

    held: int = 0
    peak: int = 0
    survivors: int = 0
    outside: int = 0
    crossing: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)


def activations(
    model: nn.Module, batch: step.Batch, *, seed: int, autocast: step.Autocast = nullcontext
) -> MemoryFacts:
    """Measure the forward of a plain step and all of a checkpointed one, of the same object. Leaves no gradient."""
    with only_new_garbage():
        with switches.checkpointing_off(model), _inputs(model) as inputs:
            plain = measure(model, batch, seed, autocast, forward_only=True)
        checkpointed = measure(model, batch, seed, autocast)
    blocks = [n for n, m in model.named_modules() if is_block(m)]
    random_state = torch.get_rng_state().nbytes  # checkpointing keeps one for each block (preserve_rng_state)
    if next(model.parameters()).is_cuda:
        random_state += torch.cuda.get_rng_state().nbytes
    allowed = plain.outside + plain.crossing + random_state * len(blocks)
    increments = _increments(checkpointed.entries)
    step_allowed = {n: b + random_state for n, b in plain.added.items()}
    over = checkpointed.held > allowed or any(increments[n] > step_allowed.get(n, 0) for n in increments)
    kept = _kept_by_stack(inputs) if over else {}
    return MemoryFacts(
        plain=plain.held,
        held=checkpointed.held,
        allowed=allowed,
        stack=sum(kept.values()),
        blocks=plain.held - plain.outside - plain.crossing,
        peak=checkpointed.peak,
        steps=increments,
        step_allowed=step_allowed,
        step_stack={n: sum(b for layer, b in kept.items() if layer.startswith(n + ".")) for n in blocks},
        survivors=checkpointed.survivors,
        plain_steps=_increments(plain.entries),
    )


def _increments(entries: Mapping[str, int]) -> dict[str, int]:
    return {a: entries[b] - entries[a] for a, b in pairwise(entries)}


class _BesideCasts(Live):
    """Tells apart copies of what was there before, such as those of float32 weights that autocast keeps until it ends."""

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__(existing)
        self._casts: dict[int, int] = {}
        self.crossed: dict[int, torch.Tensor | None] = {}  # by identity, for as long as the storage lives

    @property
    def casts(self) -> int:
        """Bytes alive of such copies."""
        return sum(self._casts.values())

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if func is internals.CONVERT and self.tag_of(args[0]) == EXISTING:
            self._casts[internals.storage_id(out)] = out.untyped_storage().nbytes()
        return out

    def freed(self, key: int) -> None:
        self._casts.pop(key, None)
        self.crossed.pop(key, None)


class _Boundaries(ExitStack):
    """Hooks on the blocks, until closed, that tag what is made inside them and note what is handed in and out."""

    def __init__(self, model: nn.Module, live: _BesideCasts, held: Held) -> None:
        super().__init__()
        self._live, self._held = live, held
        self._device = next(model.parameters()).device.type
        self.nbytes = 0  # that crossed a boundary and were made inside a block
        self._last = ""
        self.callback(live.crossed.clear)
        for name, module in model.named_modules():
            if is_block(module):
                self.enter_context(module.register_forward_pre_hook(partial(self._entered, name), with_kwargs=True))
                self.enter_context(module.register_forward_hook(self._left))

    def _cross(self, *items: Any) -> None:
        added = self._held.added
        for tensor in tensors(*items):
            key = internals.storage_id(tensor)
            tag = self._live.tag_of(tensor)
            if key not in self._live.crossed and tag != EXISTING:
                # Nothing is kept that the model drops; but no one says when a storage is freed that is not counted.
                self._live.crossed[key] = tensor if tag is None else None
                self.nbytes += tensor.untyped_storage().nbytes() if tag != OUTSIDE else 0
                if self._last:
                    added[self._last] = added.get(self._last, 0) + tensor.untyped_storage().nbytes()

    def _entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._cross(args, kwargs)
        # Autocast's copies of weights are no activations of a block: they are freed with the last one's.
        kept = self._live.casts if torch.is_autocast_enabled(self._device) else 0
        self._held.entries[name] = self._live.now - kept
        self._last = self._live.tag = name

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._cross(output)
        self._live.tag = OUTSIDE


def measure(
    model: nn.Module,
    batch: step.Batch,
    seed: int,
    autocast: step.Autocast = nullcontext,
    *,
    forward_only: bool = False,
) -> Held:
    """What one training step holds; with ``forward_only`` there is no backward. Leaves no gradient."""
    model.train()
    step.clear_gradients(model)
    held = Held()
    live = _BesideCasts([*own_tensors(model), *batch.values()])
    floor = live.now
    with switches.seeded(seed, batch), live:
        with _Boundaries(model, live, held) as boundaries:
            with autocast():
                output = model(**step.feed(model, batch))
            gc.collect()
            held.crossing = boundaries.nbytes
            held.outside = sum(size for size, tag in live.holds().values() if tag == OUTSIDE)
        held.held = live.now - floor
        held.entries["end"] = live.now
        if output.loss.requires_grad and not forward_only:
            output.loss.backward()
        held.peak = live.peak - floor
    del output
    step.clear_gradients(model)
    gc.collect()
    held.survivors = live.now - floor - _scratch(model, live)
    return held


def left_by_evaluation(model: nn.Module, batch: step.Batch, autocast: step.Autocast) -> int:
    """Bytes that a forward in eval mode leaves behind, after a first one, which makes what the stack keeps."""
    model.eval()

    def run() -> None:
        with torch.no_grad(), autocast():
            model(**step.feed(model, batch))

    run()
    # Operators that answer with a view of a weight make no storage.
    live = Live([*own_tensors(model), *batch.values()])
    floor = live.now
    with only_new_garbage():
        with live:
            run()
        gc.collect()
    return live.now - floor - _scratch(model, live)


def _scratch(model: nn.Module, live: Live) -> int:
    """Bytes alive that the quantized layers' own kernels keep from one call to the next, but their weights."""
    layers = backends.quantized_layers(model)
    kept = {internals.storage_id(t) for _, layer in layers for t in backends.recognition(layer).scratch(layer)}
    return sum(size for key, (size, tag) in live.holds().items() if key in kept and tag != EXISTING)


@contextmanager
def _inputs(model: nn.Module) -> Iterator[_Inputs]:
    """The first input of each quantized layer that runs inside: its shape and its dtype, with the layer, by name."""
    inputs: _Inputs = {}

    def note(name: str, module: nn.Module, args: Any) -> None:
        if args and args[0].is_floating_point():
            inputs.setdefault(name, (module, args[0].shape, args[0].dtype))

    with ExitStack() as hooks:
        for name, module in backends.quantized_layers(model):
            hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
        yield inputs


def _kept_by_stack(inputs: _Inputs) -> dict[str, int]:
    """Bytes that each quantized layer, bare, keeps inside a non-reentrant checkpoint of inputs like these."""
    by_shape: dict[object, int] = {}
    kept = {}
    for name, (module, shape, dtype) in inputs.items():
        recognition = backends.recognition(module)
        key = (type(module), recognition.shape(module), shape, dtype)
        if key not in by_shape:
            device = recognition.packed(module).device
            by_shape[key] = bare_layer_keeps(recognition.bare(module), shape, dtype, device)
        kept[name] = by_shape[key]
    return kept


def bare_layer_keeps(
    layer: nn.Module, shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> int:
    """Bytes beyond its input's and output's that one quantized layer holds inside a non-reentrant checkpoint."""
    x = torch.zeros(shape, dtype=dtype, device=device).requires_grad_(True)
    live = Live([x, *own_tensors(layer)])
    floor = live.now
    with live:
        # The product stands for an activation made inside the block.
        y = switches.CHECKPOINT(lambda x: layer(x * 1.0), x, use_reentrant=False, preserve_rng_state=False)
        kept = live.now - floor - y.untyped_storage().nbytes()
    return max(int(kept), 0)


def cost(prepare: Callable[[nn.Module], Any], model: nn.Module) -> CostFacts:
    """Bytes alive while and after an implementation is called on a model that is thrown away."""
    largest = max((part.untyped_storage().nbytes() for p in model.parameters() for part in parts(p)), default=0)
    on_cuda = next(model.parameters()).is_cuda
    live = Live(own_tensors(model))
    before = live.now
    if on_cuda:
        torch.cuda.empty_cache()  # what was cached before is not the implementation's
    with only_new_garbage(), live:
        prepare(model)
        gc.collect()
        peak = live.peak
    current = {internals.storage_id(t) for t in own_tensors(model)}
    stale = sum(size for key, (size, _) in live.holds().items() if key not in current)
    return CostFacts(
        before=before,
        after=live.now - stale,
        peak=peak,
        largest=largest,
        stale=stale,
        cached=empty_cache() if on_cuda else None,
    )


def empty_cache() -> int:
    """Bytes that emptying the cache of CUDA's allocator gives back: not the holes in segments that live tensors share."""
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    return reserved - torch.cuda.memory_reserved()
