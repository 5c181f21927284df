"""Where the bytes are at the peak of a step, and what CUDA's allocator takes from the device for them."""

from collections import Counter
from collections.abc import Iterable, Iterator

from kbitcheck.core.facts import ForecastFacts, ModelFacts
from kbitcheck.core.facts.fit import CurveFacts, PartFacts
from kbitcheck.observe.forecast.activations import Measured
from kbitcheck.observe.forecast.allocator import Allocator
from kbitcheck.observe.forecast.storages import Trace

POINTS = 120  # of a curve: a telephone is 390 pixels wide


def through_the_step(trace: Trace) -> CurveFacts | None:
    """The bytes alive from a step's beginning to its end; None for a step without a trace. No peak is left out."""
    if not trace.events:
        return None
    alive: Counter[str] = Counter(dict.fromkeys((storage.kind for storage in trace.storages), 0))
    every = -(-len(trace.events) // POINTS)
    curve: dict[str, list[int]] = {kind: [] for kind in alive}
    fullest = Counter(alive)
    for number, event in enumerate(trace.events, 1):
        storage = trace.storages[event if event >= 0 else ~event]
        alive[storage.kind] += storage.nbytes if event >= 0 else -storage.nbytes
        if (number - 1) % every == 0 or alive.total() > fullest.total():
            fullest = Counter(alive)
        if number % every == 0 or number == len(trace.events):
            for kind, points in curve.items():
                points.append(fullest[kind])
    last = len(trace.events) // every
    blocks = {block: min(position // every, last) for block, position in trace.left.items() if block}
    return CurveFacts(kinds=curve, turn=min(trace.turn // every, last), blocks=blocks)


def at_the_peak(forecast: ForecastFacts, step: Measured, trace: Trace) -> tuple[PartFacts, ...]:
    """The bytes alive at the peak of a training step with this trace; they sum to the step's total.

    If the adapters' gradients alone are more than the step's peak, they are what is alive, after the backward. Nothing comes
    back for a step without a trace.
    """
    if not trace.events:
        return ()
    sizes: Counter[tuple[str, str]] = Counter()
    for name, group in forecast.groups.items():
        sizes["packed weights", name] += group.packed
        sizes["quantization state", name] += group.state
        sizes["other weights", name] += group.unquantized + group.buffers
        sizes["upcast", name] += group.upcast.get(forecast.profile, 0)
    sizes["adapters", ""] = forecast.adapters
    sizes["optimizer", ""] = forecast.optimizer[forecast.chosen]
    if step.peak < forecast.adapters:
        sizes["gradients", ""] = forecast.adapters
    else:
        sizes["gradients", ""] = step.accumulated
        for storage in trace.at_peak():
            sizes[storage.kind, storage.block] += storage.nbytes
    return tuple(PartFacts(kind=k, where=where, nbytes=nbytes) for (k, where), nbytes in sizes.items() if nbytes)


def allocated(
    forecast: ForecastFacts, facts: ModelFacts, step: Measured, trace: Trace, *, limit: int | None = None
) -> Allocator:
    """CUDA's allocator after a step beside what stays, where the device has room for ``limit`` bytes, None: for any."""
    allocator = Allocator(limit)
    allocator.play(_staying(forecast, facts, step))
    for event in trace.events:
        if event >= 0:
            allocator.make(event, trace.storages[event].nbytes)
        else:
            allocator.free(~event)
    return allocator


def _staying(forecast: ForecastFacts, facts: ModelFacts, step: Measured) -> Iterator[int]:
    """Bytes of each storage that stays through training, once; all state of a group of layers is one."""
    yield from {t.storage: t.nbytes for t in (*facts.parameters.values(), *facts.buffers.values())}.values()
    yield from (group.state for group in forecast.groups.values())
    yield from (group.upcast.get(forecast.profile, 0) for group in forecast.groups.values())
    # An adapter's weight, and as much for its gradient if that stays, and for the optimizer's state.
    yield from (forecast.adapters, forecast.optimizer[forecast.chosen], step.accumulated)


def named(parts: Iterable[PartFacts], kind: str) -> int:
    """Bytes of one kind."""
    return sum(part.nbytes for part in parts if part.kind == kind)
