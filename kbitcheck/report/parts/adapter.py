"""The table of a saved adapter: a row for each target of its layers."""

from collections.abc import Iterator, Mapping
from typing import Any

Row = tuple[str, str, str]


def rows(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Rows as of ``memory.rows``: a heading, the case (one alone: ""), and the text."""
    for of_case in facts.values():
        adapter = of_case.get("adapter")
        if adapter is None:
            return
        beside = f"beside {adapter['compared']}" if adapter["compared"] else f"not compared: {adapter['missing']}"
        yield "adapter", "", f"{adapter['method']}, {beside}"
        for target, figures in adapter["targets"].items():
            yield target, "", _layers(figures)
        yield from _merge(adapter.get("merge"))
        if adapter["cannot_tell"]:
            yield "moved", "", f"cannot be told: {adapter['cannot_tell']}"


def _merge(merge: Mapping[str, Any] | None) -> Iterator[Row]:
    """How far logits are from those of the float64 twin with the adapter, beside what the adapter does to them."""
    if merge is None:
        return
    yield "merge", "", f"the adapter moves the logits by {merge['effect']:.2%}; from there, in float64, they are off"
    for name, error in merge["errors"].items():
        share = f", {error / merge['effect']:.0%} of what it does" if merge["effect"] else ""
        yield "", "", f"{error:.2%}{share}: {name}"
    for name in merge["refused"]:
        yield "", "", f"PEFT does not merge this method into {name}"
    if merge["unread"]:
        yield "", "", f"{merge['unread']} layers could not be followed through a merge"


def _layers(figures: Mapping[str, Any]) -> str:
    number = figures["layers"]
    parts = [f"{number} layer{'s' * (number > 1)}"]
    if figures["whole"]:
        parts.append("stored whole")
    if figures["rows"]:
        parts.append(f"{figures['rows']:,} rows stored")
    if figures["experts"]:
        parts.append(f"{figures['experts']} experts")
    if figures["ranks"]:
        parts.append(f"rank {_range(figures['ranks'])}")
    if figures["scalings"]:
        parts.append(f"scaling {_range(figures['scalings'])}")
    parts.append(" and ".join(figures["dtypes"]))
    if figures["norms"]:
        parts.append(f"norm of what it adds {_range(figures['norms'])}")
    replaced = figures["replaced"]
    if replaced["changes"]:
        changed = sum(bool(change) for change in replaced["changes"])
        norm = f"{_range([100 * change for change in replaced['changes']])} % off the base's"
        rows = f"in {replaced['rows']:,} of {replaced['count']:,} rows"
        stored = f"{norm}, {rows}" if changed else "as in the base"
        parts.append(f"tensors of the base beside it, {stored}" if figures["beside"] else stored)
    if figures["not_finite"]:
        parts.append(f"{figures['not_finite']:,} numbers not finite")
    if figures["moved"] is not None:
        parts.append(f"{figures['moved']} of {number} moved")
    return ", ".join(parts)


def _range(numbers: list[float]) -> str:
    low, high = f"{numbers[0]:.3g}", f"{numbers[-1]:.3g}"
    return low if low == high else f"{low} to {high}"
