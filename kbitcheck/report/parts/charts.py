"""The charts of a report, each with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kbitcheck.core.report import Report
from kbitcheck.report.parts import gradient_chart, step_chart
from kbitcheck.report.parts.drawing import SERIES, Chart, name_ticks, svg, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cases = Mapping[str, Mapping[str, Any]]  # facts or specs of each

BARS = 8  # models in the first chart
CASE = 48  # characters of a case's name above its bar
# As kbitcheck.observe.figures names them; those that a chart has no colour for are its rest.
GROUPS = (
    "quantized", "embeddings", "head", "norms", "experts", "routers", "attention", "mlp", "vision", "audio", "other", "buffers",
)  # fmt: skip


def charts(report: Report) -> list[Chart]:
    """The charts that the report's facts allow."""
    cases: Cases = report.facts.get("cases", {})
    specs: Cases = report.subject.get("cases", {})
    checkpointed = {c: f for c, f in cases.items() if specs.get(c, {}).get("checkpointing") != "off"}
    return [
        *step_chart.charts(cases),
        *gradient_chart.charts(cases),
        *_bytes(cases, specs),
        *_peaks(cases),
        *_activations(checkpointed or cases),
    ]


def _bytes(cases: Cases, specs: Cases) -> Iterator[Chart]:
    of_model: dict[str, Mapping[str, Mapping[str, int]]] = {}
    for case, facts in cases.items():
        if groups := facts.get("bytes_by_group"):
            spec = specs.get(case, {})
            of_model.setdefault(f"{spec.get('model', case)} {spec.get('quant', '')}".strip(), groups)
    if not of_model:
        return
    by_growth = sorted(of_model, key=lambda name: -_growth(of_model[name]))[:BARS]
    bars = [(name, stage, of_model[name][stage]) for name in by_growth for stage in ("loaded", "prepared")]
    sizes = [counts for _, _, counts in bars]
    largest = {group: max(counts.get(group, 0) for counts in sizes) for counts in sizes for group in counts}
    present = {group for group, size in largest.items() if size}
    columns = [*(g for g in GROUPS if g in present), *sorted(present.difference(GROUPS))]
    unit, scale = unit_of(max(sum(counts.values()) for counts in sizes))

    def draw(axes: Axes) -> None:
        enough = len(columns) <= len(SERIES)
        own = columns if enough else sorted(columns, key=lambda g: -largest[g])[: len(SERIES) - 1]
        stacks = {g: [g] for g in columns if g in own}
        if not enough:
            stacks["the rest"] = [g for g in columns if g not in own]
        places = [-(i + i // 2 * 1.1) for i in range(len(bars))]
        left = [0.0] * len(bars)
        for color, (label, members) in zip(SERIES, stacks.items(), strict=False):
            widths = [sum(counts.get(g, 0) for g in members) / scale for counts in sizes]
            axes.barh(places, widths, 0.85, left=left, color=color, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(places, [stage for _, stage, _ in bars])
        for place, name in zip(places[::2], by_growth, strict=True):
            axes.text(0, place + 0.5, f" {name}", va="bottom")
        axes.set_ylim(places[-1] - 0.6, 1.5)
        axes.set_xlabel(unit)

    few = f" The {BARS} of {len(of_model)} that grow most." if len(of_model) > BARS else ""
    yield Chart(
        title="Where the bytes are",
        caption=f"Parameters and buffers as loaded and after preparing.{few}",
        svg=svg("bytes", draw, 1.5 + 0.32 * len(bars), grid="x"),
        columns=("model", *columns, "all"),
        rows=tuple(
            (f"{name}, {stage}", *(f"{counts.get(g, 0):,}" for g in columns), f"{sum(counts.values()):,}")
            for name, stage, counts in bars
        ),
    )


def _growth(groups: Mapping[str, Mapping[str, int]]) -> float:
    return sum(groups["prepared"].values()) / max(sum(groups["loaded"].values()), 1)


def _peaks(cases: Cases) -> Iterator[Chart]:
    """What is alive at the predicted peak of a training step, by kind, in each case."""
    of_case: dict[str, dict[str, int]] = {}
    for case, facts in cases.items():
        kinds: dict[str, int] = {}
        for part in facts.get("forecast", {}).get("parts", ()):
            kinds[part["kind"]] = kinds.get(part["kind"], 0) + part["nbytes"]
        if kinds:
            of_case[case] = kinds
    if not of_case:
        return
    shown = sorted(of_case, key=lambda case: -sum(of_case[case].values()))[:BARS]
    most = {kind: max(of_case[case].get(kind, 0) for case in shown) for case in shown for kind in of_case[case]}
    columns = sorted(most, key=lambda kind: -most[kind])
    unit, scale = unit_of(max(sum(of_case[case].values()) for case in shown))

    def draw(axes: Axes) -> None:
        own = columns if len(columns) <= len(SERIES) else columns[: len(SERIES) - 1]
        stacks = {kind: [kind] for kind in own} | ({"the rest": columns[len(own) :]} if len(own) < len(columns) else {})
        left = [0.0] * len(shown)
        places = [-1.6 * i for i in range(len(shown))]
        for color, (label, members) in zip(SERIES, stacks.items(), strict=False):
            widths = [sum(of_case[case].get(kind, 0) for kind in members) / scale for case in shown]
            axes.barh(places, widths, 0.85, left=left, color=color, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks([])
        for place, case in zip(places, shown, strict=True):
            axes.text(0, place + 0.5, f" {case if len(case) <= CASE else '…' + case[1 - CASE :]}", va="bottom")
        axes.set_ylim(places[-1] - 0.6, 1.4)
        axes.set_xlabel(unit)

    few = f" The {BARS} largest of {len(of_case)}." if len(of_case) > BARS else ""
    yield Chart(
        title="What is alive at the peak of a training step",
        caption=f"Predicted, on the device, by kind; together they are the peak allocated.{few}",
        svg=svg("peaks", draw, 1.5 + 0.45 * len(shown), grid="x"),
        columns=("case", *columns, "all"),
        rows=tuple(
            (case, *(f"{of_case[case].get(kind, 0):,}" for kind in columns), f"{sum(of_case[case].values()):,}")
            for case in shown
        ),
    )


def _activations(cases: Cases) -> Iterator[Chart]:
    of_case = {case: facts for case, facts in cases.items() if facts.get("activations_by_block", {}).get("blocks")}
    if not of_case:
        return
    case = max(of_case, key=lambda c: of_case[c]["checkpointed"] / max(of_case[c]["activations"], 1))
    facts = of_case[case]["activations_by_block"]
    names, plain, held = facts["blocks"], facts["plain"], facts["checkpointed"]
    unit, scale = unit_of(max(*plain, *held))

    def draw(axes: Axes) -> None:
        places = range(len(names))
        axes.bar([p - 0.2 for p in places], [b / scale for b in plain], 0.4, color=SERIES[5], label="plain")
        axes.bar([p + 0.2 for p in places], [b / scale for b in held], 0.4, color=SERIES[0], label="as prepared")
        name_ticks(axes, names)
        axes.set_ylabel(f"{unit} added by the block")

    rest = f" Of {len(of_case)} cases this is the one where least is saved." if len(of_case) > 1 else ""
    yield Chart(
        title="Activation bytes by block",
        caption=f"{case}: what each block adds to what a training step holds, with checkpointing off (plain) and as the "
        f"model was prepared; the last block includes what follows it.{rest}",
        svg=svg("activations", draw, 2.9, grid="y"),
        columns=("block", "plain", "as prepared"),
        rows=tuple((n, f"{a:,}", f"{b:,}") for n, a, b in zip(names, plain, held, strict=True)),
    )
