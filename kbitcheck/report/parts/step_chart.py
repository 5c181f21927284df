"""Memory over one training step by kind, as predicted, and beside it what a step of that shape was measured to hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from kbitcheck.report.parts.drawing import INK, SERIES, Chart, svg, unit_of
from kbitcheck.report.parts.fit import with_checkpointing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What each layer of the drawing holds, from the bottom: kinds of the parts that stay, and of those that a step makes.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "weights": ("packed weights", "quantization state", "other weights"),
    "upcast": ("upcast",),
    "adapters, gradients": ("adapters", "gradients"),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "logits": ("logits and loss",),
    "workspace": ("workspace",),
}
STAYS = ("packed weights", "quantization state", "other weights", "upcast", "adapters", "optimizer")
Facts = Mapping[str, Any]


def charts(cases: Mapping[str, Facts]) -> Iterator[Chart]:
    """The step of the case that takes most."""
    curves = {case: facts for case, facts in cases.items() if (facts.get("forecast") or {}).get("curve")}
    if not curves:
        return
    case = max(curves, key=lambda c: max(_totals(curves[c]["forecast"])))
    facts = curves[case]
    forecast = facts["forecast"]
    layers, totals = _layers(forecast), _totals(forecast)
    held = dict(measured(facts))
    unit, scale = unit_of(max(*totals, *held.values()))

    def draw(axes: Axes) -> None:
        places = range(len(totals))
        stacks = [[nbytes / scale for nbytes in points] for points in layers.values()]
        axes.stackplot(places, stacks, labels=list(layers), colors=SERIES, linewidth=0)
        if held:
            points = [nbytes / scale for nbytes in held.values()]
            axes.plot(list(held), points, "o-", markersize=3, linewidth=1, color=INK, label="measured")
        axes.axvline(forecast["curve"]["turn"], color=INK, linewidth=0.8, linestyle=":")
        axes.set_xticks([0, forecast["curve"]["turn"]], ["forward", "backward"], ha="left")
        axes.set_xlim(0, len(totals) - 1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)

    peak = totals.index(max(totals))
    shape = f"{forecast['batch']:,} × {forecast['seq_len']:,} tokens"
    yield Chart(
        title="Memory over one step",
        caption=f"{case}: {shape} {with_checkpointing(forecast['mode'])}, predicted for {forecast['device']}; from left to right every "
        f"tensor that is made or freed.{_beside(facts, held)}{_several(curves)}",
        svg=svg("step", draw, 3.6, grid="y"),
        columns=("kind", "at the beginning", "at the peak", "at the end"),
        rows=tuple(
            (name, *(f"{points[place]:,}" for place in (0, peak, -1)))
            for name, points in (*layers.items(), ("all", totals))
        ),
    )


def _several(curves: Mapping[str, Facts]) -> str:
    return f" Of {len(curves)} cases this is the one that takes most." if len(curves) > 1 else ""


def _beside(facts: Facts, held: Mapping[int, int]) -> str:
    if held:
        return " Measured is what the forward held after each block, above what stays."
    if "activations_by_block" in facts:
        shape = " × ".join(map(str, facts["batch"]))
        return f" What was measured is a step of {shape} tokens: see the activations by block."
    return " No step was run, so that nothing was measured."


def _layers(forecast: Facts) -> dict[str, Sequence[int]]:
    """Bytes of each layer at each point."""
    stays: dict[str, int] = dict.fromkeys(STAYS, 0)
    for part in forecast["parts"]:
        if part["kind"] in stays:
            stays[part["kind"]] += part["nbytes"]
    # From the second of several batches on, gradients are there all the time.
    stays["gradients"] = forecast["adapters"] if forecast["accumulate"] > 1 else 0
    made, points = forecast["curve"]["kinds"], len(next(iter(forecast["curve"]["kinds"].values())))
    return {
        layer: [sum(stays.get(k, 0) + made.get(k, (0,) * points)[n] for k in kinds) for n in range(points)]
        for layer, kinds in LAYERS.items()
    }


def _totals(forecast: Facts) -> list[int]:
    return [sum(column) for column in zip(*_layers(forecast).values(), strict=True)]


def measured(facts: Facts) -> Iterator[tuple[int, int]]:
    """What a step of the forecast's own shape held when its forward left each block, by the point of the curve."""
    forecast, steps = facts["forecast"], facts.get("activations_by_block") or {}
    blocks = forecast["curve"]["blocks"]
    names = steps.get("blocks", ())
    if facts.get("batch") != [forecast["batch"], forecast["seq_len"]] or not set(names) <= blocks.keys():
        return
    stays = sum(part["nbytes"] for part in forecast["parts"] if part["kind"] in STAYS)
    for name, held in zip(names, accumulate(steps["checkpointed"]), strict=True):
        yield blocks[name], stays + held
