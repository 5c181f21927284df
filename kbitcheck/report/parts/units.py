"""Sizes and shares as people read them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def size(number: float) -> str:
    """Three figures and a binary prefix, as memory is sold and as torch reports it."""
    for unit in BINARY[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} {BINARY[-1]}"


def scaled(number: float, units: tuple[str, ...]) -> str:
    """Three figures and one of the units, each a thousand times the one before."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}"


MOST = 0.5


class QuantizedShare(NamedTuple):
    """The share of a model's weights that is quantized, and a text with what the others take."""

    share: float
    text: str


def quantized_share(facts: Mapping[str, Any]) -> QuantizedShare | None:
    """The quantized share of a case's model; None of a report that does not say it."""
    if not facts.get("parameters") or "unquantized_bytes" not in facts:
        return None
    share = facts["quantized"] / facts["parameters"]
    return QuantizedShare(
        share, f"{_percent(share)} quantized, the other weights take {size(facts['unquantized_bytes'])}"
    )


def _percent(share: float) -> str:
    """Two figures of a small share, whole percents of a large one; never 100 % of a part."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{min(round(100 * share), 99)} %"
