"""Charts as inline SVG, drawn by matplotlib; colours are CSS variables, so that they follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from kbitcheck.core.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cases = Mapping[str, Mapping[str, Any]]  # facts or specs of each

# Colours that stand for CSS: matplotlib takes no variables, so they are put in afterwards.
INK = "#010203"
SERIES = ("#0102a0", "#0102a1", "#0102a2", "#0102a3", "#0102a4", "#0102a5", "#0102a6")
CSS = {INK: "currentColor", **{stand_in: f"var(--series-{n})" for n, stand_in in enumerate(SERIES)}}
BARS = 8  # models in the first chart
LAYERS = 60  # points in the last
WIDTH = 5.2  # inches, of 72 CSS pixels: a telephone's width
LABEL = 20  # characters of a tick's label
CASE = 48  # characters of a case's name above its bar
TICKS = 14
# As kbitcheck.observe.figures names them; those that a chart has no colour for are its rest.
GROUPS = (
    "quantized", "embeddings", "head", "norms", "experts", "routers", "attention", "mlp", "vision", "audio", "other", "buffers",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing and its numbers. ``svg`` is empty where matplotlib is not installed; the table says the same."""

    title: str
    caption: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def charts(report: Report) -> list[Chart]:
    """The charts that the report's facts allow."""
    cases: Cases = report.facts.get("cases", {})
    specs: Cases = report.subject.get("cases", {})
    checkpointed = {c: f for c, f in cases.items() if specs.get(c, {}).get("checkpointing") != "off"}
    return [*_bytes(cases, specs), *_peaks(cases), *_activations(checkpointed or cases), *_gradients(cases)]


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
    unit, scale = _unit(max(sum(counts.values()) for counts in sizes))

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
        svg=_svg("bytes", draw, 1.5 + 0.32 * len(bars), grid="x"),
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
    unit, scale = _unit(max(sum(of_case[case].values()) for case in shown))

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
        svg=_svg("peaks", draw, 1.5 + 0.45 * len(shown), grid="x"),
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
    unit, scale = _unit(max(*plain, *held))

    def draw(axes: Axes) -> None:
        places = range(len(names))
        axes.bar([p - 0.2 for p in places], [b / scale for b in plain], 0.4, color=SERIES[5], label="plain")
        axes.bar([p + 0.2 for p in places], [b / scale for b in held], 0.4, color=SERIES[0], label="as prepared")
        _named(axes, names)
        axes.set_ylabel(f"{unit} added by the block")

    rest = f" Of {len(of_case)} cases this is the one where least is saved." if len(of_case) > 1 else ""
    yield Chart(
        title="Activation bytes by block",
        caption=f"{case}: what each block adds to what a training step holds, with checkpointing off (plain) and as the "
        f"model was prepared; the last block includes what follows it.{rest}",
        svg=_svg("activations", draw, 2.9, grid="y"),
        columns=("block", "plain", "as prepared"),
        rows=tuple((n, f"{a:,}", f"{b:,}") for n, a, b in zip(names, plain, held, strict=True)),
    )


def _gradients(cases: Cases) -> Iterator[Chart]:
    of_case: dict[str, list[tuple[str, float, float]]] = {}
    for case, facts in cases.items():
        errors = facts.get("gradient_errors", {})
        if errors.get("layers"):
            of_case[case] = list(zip(errors["layers"], errors["error"], errors["bound"], strict=True))
    if not of_case:
        return

    def ratio(row: tuple[str, float, float]) -> float:
        _, error, bound = row
        return error / bound if bound else 0.0

    worst = max(of_case, key=lambda c: max(map(ratio, of_case[c])))
    rows = of_case[worst]
    kept = sorted(rows, key=ratio, reverse=True)[:LAYERS]
    shown = [row for row in rows if row in kept]

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import LogFormatter

        places = range(len(shown))
        # Nothing at all has no logarithm.
        axes.plot(places, [max(e, 1e-12) for _, e, _ in shown], "o", markersize=4, color=SERIES[0], label="error")
        axes.plot(places, [max(b, 1e-12) for *_, b in shown], "_", markersize=8, color=SERIES[2], label="bound")
        axes.set_yscale("log")
        # The default writes powers as formulas, which take longer to set than all else to draw.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        _named(axes, [name for name, _, _ in shown])
        axes.set_ylabel("relative error")

    rest = f" Of {len(of_case)} cases this is the one nearest to its bound." if len(of_case) > 1 else ""
    few = f" The worst {LAYERS} of {len(rows)} layers." if len(rows) > LAYERS else ""
    yield Chart(
        title="Gradient error by layer",
        caption=f"{worst}: adapters' gradients against the float64 twin's, each layer's worst, and KB304's bound."
        f"{few}{rest}",
        svg=_svg("gradients", draw, 3.6, grid="y"),
        columns=("layer", "relative error", "bound"),
        rows=tuple((name, f"{error:.3g}", f"{bound:.3g}") for name, error, bound in rows),
    )


def _named(axes: Axes, names: Sequence[str]) -> None:
    """Ticks for at most ``TICKS`` places, without the part that all names share."""
    every = -(-len(names) // TICKS)
    places = list(range(0, len(names), every))
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    prefix = sum(1 for _ in takewhile(lambda part: len(set(part)) == 1, parts))
    labels = [re.sub(r"(^|\.)(block|layers?|h)\.(?=\d)", r"\1", ".".join(names[p].split(".")[prefix:])) for p in places]
    labels = [label if len(label) <= LABEL else "…" + label[1 - LABEL :] for label in labels]
    steep = max(map(len, labels)) > 6
    axes.set_xticks(places, labels, rotation=40 if steep else 0, ha="right" if steep else "center")


def _unit(largest: float) -> tuple[str, float]:
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    return next((unit for unit in units if largest >= unit[1]), ("bytes", 1.0))


def _svg(name: str, draw: Callable[[Axes], None], height: float, *, grid: Any) -> str:
    """The figure as an SVG element, or nothing where matplotlib is not installed. Its ids begin with ``name``."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    style: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.0}
    style |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "none")
    out = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right", "left" if grid == "y" else "bottom"]].set_visible(False)
        axes.grid(axis=grid, alpha=0.2, color=INK)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
        # savefig would draw everything twice.
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for stand_in, css in CSS.items():
        text = text.replace(stand_in, css)
    return text.replace("<svg ", '<svg role="img" aria-hidden="true" focusable="false" ', 1)
