"""What a training step holds, and what preparing costs, in bytes of storages alive."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.facts import CostFacts, MemoryFacts
from kbitcheck.probes import step
from kbitcheck.probes.live import Live, storage_id, tensors
from kbitcheck.probes.snapshot import is_block

MODEL, OUTSIDE = "model", ""


@dataclass(slots=True)
class _Held:
    """What one watched step held. ``crossing`` is what is handed into and out of blocks, each storage once.

    ``entries`` is what was alive when each block was entered, ``added`` what crossed a boundary for the first time from
    one entry to the next.
    """

    held: int = 0
    peak: int = 0
    survivors: int = 0
    outside: int = 0
    crossing: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)


def activations(
    model: nn.Module,
    batch: step.Batch,
    adapters: Mapping[str, nn.Parameter],
    *,
    seed: int,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> MemoryFacts:
    """Measure a plain and a checkpointed step of the same object. Leaves no gradient."""
    with step.checkpointing_off(model):
        plain = _measure(model, batch, seed, autocast)
    checkpointed = _measure(model, batch, seed, autocast)
    blocks = [n for n, m in model.named_modules() if is_block(m)]
    # Checkpointing keeps the generators' state for each block (preserve_rng_state).
    random_state = torch.get_rng_state().nbytes * len(blocks)
    allowed = plain.outside + plain.crossing + random_state
    increments = _increments(checkpointed.entries)
    step_allowed = {n: b + torch.get_rng_state().nbytes for n, b in plain.added.items()}
    over = checkpointed.held > allowed or any(increments[n] > step_allowed.get(n, 0) for n in increments)
    kept = _kept_by_stack(model, batch) if over else {}
    return MemoryFacts(
        plain=plain.held,
        held=checkpointed.held,
        allowed=allowed,
        stack=sum(kept.values()),
        blocks=plain.held - plain.outside - plain.crossing,
        peak=checkpointed.peak,
        peak_plain=plain.peak,
        steps=increments,
        step_allowed=step_allowed,
        step_stack={n: sum(b for layer, b in kept.items() if layer.startswith(n + ".")) for n in blocks},
        survivors=checkpointed.survivors,
    )


def _increments(entries: Mapping[str, int]) -> dict[str, int]:
    names = list(entries)
    return {a: entries[b] - entries[a] for a, b in zip(names, names[1:], strict=False)}


def _measure(model: nn.Module, batch: step.Batch, seed: int, autocast: Any) -> _Held:
    model.train()
    step.clear_gradients(model)
    found = _Held()
    existing = [*model.parameters(), *model.buffers(), *batch.values(), *_states(model)]
    live = Live()
    live.tag = MODEL
    for tensor in existing:
        live.add(tensor)
    live.tag = OUTSIDE
    floor = live.now
    crossing: dict[int, torch.Tensor] = {}  # kept alive meanwhile: an identity is only one while its storage lives
    blocks: list[str] = []

    def cross(*items: Any) -> None:
        for tensor in tensors(*items):
            if storage_id(tensor) not in crossing and not live.is_tagged(tensor, MODEL):
                crossing[storage_id(tensor)] = tensor
                if blocks:
                    found.added[blocks[-1]] = found.added.get(blocks[-1], 0) + tensor.untyped_storage().nbytes()

    def entered(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            cross(args, kwargs)
            found.entries[name] = live.now
            blocks.append(name)
            live.tag = name

        return hook

    def left(module: nn.Module, args: Any, output: Any) -> None:
        cross(output)
        live.tag = OUTSIDE

    handles = []
    for name, module in model.named_modules():
        if is_block(module):
            handles.append(module.register_forward_pre_hook(entered(name), with_kwargs=True))
            handles.append(module.register_forward_hook(left))
    try:
        with step.seeded(seed, str(next(iter(batch.values())).device)), live:
            with autocast() if autocast else nullcontext():
                output = model(**step.feed(model, batch))
            for handle in handles:
                handle.remove()
            gc.collect()
            found.crossing = sum(
                t.untyped_storage().nbytes() for k, t in crossing.items() if not live.is_tagged(t, OUTSIDE)
            )
            found.outside = sum(size for size, tag in live.holds().values() if tag == OUTSIDE)
            crossing.clear()
            found.held = live.now - floor
            found.entries["end"] = live.now
            live.peak = live.now
            if output.loss.requires_grad:
                output.loss.backward()
            found.peak = live.peak - floor
    finally:
        for handle in handles:
            handle.remove()
    del output
    step.clear_gradients(model)
    gc.collect()
    found.survivors = live.now - floor
    return found


def _states(model: nn.Module) -> Iterable[torch.Tensor]:
    """Tensors of the quantization states: the layers' own memory, though no parameter or buffer."""
    for module in model.modules():
        if backends.is_quantized(module):
            yield from (v for v in backends.state(module).values() if isinstance(v, torch.Tensor))


def _kept_by_stack(model: nn.Module, batch: step.Batch) -> dict[str, int]:
    """Bytes that each quantized layer keeps although a non-reentrant checkpoint surrounds it, in this model's shapes.

    A bare layer is the witness: nothing of the implementation takes part. Layers that give everything back are left out.
    """
    shapes: dict[str, tuple[nn.Module, torch.Size, torch.dtype]] = {}
    handles = []
    for name, module in model.named_modules():
        if backends.is_quantized(module):

            def saw(module: nn.Module, args: Any, name: str = name) -> None:
                shapes.setdefault(name, (module, args[0].shape, args[0].dtype))

            handles.append(module.register_forward_pre_hook(saw))
    try:
        with torch.no_grad(), step.seeded(0, "cpu"):
            model(**step.feed(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    by_shape: dict[object, int] = {}
    found = {}
    for name, (module, shape, dtype) in shapes.items():
        key = (type(module), backends.shape(module), shape, dtype)
        if key not in by_shape:
            by_shape[key] = bare_layer_keeps(module, shape, dtype)
        if by_shape[key]:
            found[name] = by_shape[key]
    return found


def bare_layer_keeps(layer: nn.Module, shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes beyond its input's and output's that one quantized layer holds inside a non-reentrant checkpoint."""
    device = layer.weight.device
    x = torch.zeros(shape, dtype=dtype, device=device).requires_grad_(True)
    live = Live([x, *layer.parameters(), *(v for v in backends.state(layer).values() if isinstance(v, torch.Tensor))])
    floor = live.now

    def inner(x: torch.Tensor) -> torch.Tensor:
        return layer(x * 1.0)  # the product stands for an activation made inside the block

    with live:
        y = step.CHECKPOINT(inner, x, use_reentrant=False, preserve_rng_state=False)
        kept = live.now - floor - y.untyped_storage().nbytes()
    return max(kept, 0)


def cost(prepare: Callable[[nn.Module], Any], model: nn.Module) -> CostFacts:
    """Call an implementation on a model that is thrown away, and count the bytes alive meanwhile and afterwards."""
    existing = [*model.parameters(), *model.buffers(), *_states(model)]
    largest = max((p.untyped_storage().nbytes() for p in model.parameters()), default=0)
    live = Live()
    live.tag = MODEL
    for tensor in existing:
        live.add(tensor)
    del existing
    before = live.now
    with live:
        prepare(model)
        gc.collect()
        peak = live.peak
    current = {storage_id(t) for t in (*model.parameters(), *model.buffers(), *_states(model))}
    stale = sum(size for key, (size, _) in live.holds().items() if key not in current)
    reserved = None
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return CostFacts(before=before, after=live.now - stale, peak=peak, largest=largest, stale=stale, reserved_unused=reserved)
