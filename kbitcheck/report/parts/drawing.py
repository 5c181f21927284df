"""Drawing a chart as inline SVG by matplotlib; colours are CSS variables, so that they follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stand for CSS: matplotlib takes no variables, so they are put in afterwards.
INK = "#010203"
SERIES = ("#0102a0", "#0102a1", "#0102a2", "#0102a3", "#0102a4", "#0102a5", "#0102a6")
CSS = {INK: "currentColor", **{stand_in: f"var(--series-{n})" for n, stand_in in enumerate(SERIES)}}
WIDTH = 5.2  # inches, of 72 CSS pixels: a telephone's width
LABEL = 20  # characters of a tick's label
TICKS = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing and its numbers. ``svg`` is empty where matplotlib is not installed; the table says the same."""

    title: str
    caption: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Ticks for at most ``TICKS`` places, without the part that all names share."""
    every = -(-len(names) // TICKS)
    places = list(range(0, len(names), every))
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    prefix = sum(1 for _ in takewhile(lambda part: len(set(part)) == 1, parts))
    labels = [
        re.sub(r"(^|\.)(block|layers?|h)\.(?=\d)", r"\1", ".".join(names[p].split(".")[prefix:]).rstrip("."))
        for p in places
    ]
    labels = [label if len(label) <= LABEL else "…" + label[1 - LABEL :] for label in labels]
    steep = max(map(len, labels)) > 6
    axes.set_xticks(places, labels, rotation=40 if steep else 0, ha="right" if steep else "center")


def unit_of(largest: float) -> tuple[str, float]:
    """The unit that a size of bytes is best shown in, and how many bytes it has."""
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    return next((unit for unit in units if largest >= unit[1]), ("bytes", 1.0))


def svg(name: str, draw: Callable[[Axes], None], height: float, *, grid: Any) -> str:
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
