"""Gradient error by block against its bound: the chart that says whether a model trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbitcheck.report.parts.drawing import SERIES, Chart, name_ticks, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = tuple[str, float, float]  # layer, error, bound
BLOCK = re.compile(r"(.*?\.\d+)\.")
BLOCKS = 60  # points
LEAST = 1e-12  # nothing at all has no logarithm


def charts(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    """The chart of the case that comes nearest to its bound, if any has gradients beside its twin's."""
    of_case: dict[str, list[Row]] = {}
    for case, facts in cases.items():
        errors = facts.get("gradient_errors", {})
        if errors.get("layers"):
            of_case[case] = list(zip(errors["layers"], errors["error"], errors["bound"], strict=True))
    if not of_case:
        return
    worst = max(of_case, key=lambda c: max(map(_ratio, of_case[c])))
    rows = of_case[worst]
    blocks = by_block(rows)
    kept = sorted(blocks, key=_ratio, reverse=True)[:BLOCKS]
    shown = [row for row in blocks if row in kept]

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import LogFormatter

        places = range(len(shown))
        axes.plot(places, [max(e, LEAST) for _, e, _ in shown], "o", markersize=4, color=SERIES[0], label="error")
        axes.plot(places, [max(b, LEAST) for *_, b in shown], "_", markersize=8, color=SERIES[2], label="bound")
        axes.set_yscale("log")
        # The default writes powers as formulas, which take longer to set than all else to draw.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        name_ticks(axes, [f"{block}." for block, _, _ in shown])
        axes.set_ylabel("relative error")

    rest = f" Of {len(of_case)} cases this is the one nearest to its bound." if len(of_case) > 1 else ""
    few = f" The worst {BLOCKS} of {len(blocks)} blocks." if len(blocks) > BLOCKS else ""
    yield Chart(
        title="Gradient error by block",
        caption=f"{worst}: adapters' gradients against the float64 twin's, the worst layer of each block, and KB304's bound. "
        f"An error below its bound is rounding; above it the gradient is wrong.{few}{rest}",
        svg=svg("gradients", draw, 3.6, grid="y"),
        columns=("layer", "relative error", "bound"),
        rows=tuple((name, f"{error:.3g}", f"{bound:.3g}") for name, error, bound in rows),
    )


def by_block(rows: Sequence[Row]) -> list[Row]:
    """The worst layer of each block, under the block's name; a layer outside of all under its own."""
    worst: dict[str, Row] = {}
    for layer, error, bound in rows:
        match = BLOCK.match(layer)
        row = (match[1] if match else layer, error, bound)
        worst[row[0]] = max(worst.get(row[0], row), row, key=_ratio)
    return list(worst.values())


def _ratio(row: Row) -> float:
    _, error, bound = row
    return error / bound if bound else 0.0
