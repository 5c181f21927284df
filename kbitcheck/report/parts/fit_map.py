"""The map of what fits, by batch and length: predicted steps beside the requested memory, and beside other GPUs' as an estimate."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from kbitcheck.core.memory_sizes import GIB, GPUS
from kbitcheck.core.report import Report
from kbitcheck.report.parts.drawing import unit_of
from kbitcheck.report.parts.fit import with_checkpointing

Fit = Literal["fits", "tight", "over", "none"]
MARKS: Mapping[Fit, str] = {"fits": "✓", "tight": "!", "over": "✗", "none": "?"}
MOST = 4  # maps in a report


@dataclass(frozen=True, slots=True)
class Cell:
    """What a device needs for one shape, in bytes; 0 where no step of it was predicted."""

    needed: int
    short: int
    fit: Fit
    size: str = ""  # in the map's unit

    @property
    def mark(self) -> str:
        """Whether it fits, as a sign."""
        return MARKS[self.fit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """The cells by batch, in the order of ``lengths``; ``others`` are other GPUs' names by their bytes."""

    case: str
    memory: int
    device: str
    others: Mapping[int, str]
    requested: tuple[int, int]
    conditions: str
    unit: str
    lengths: tuple[int, ...]
    rows: Mapping[int, tuple[Cell, ...]]


def maps(report: Report) -> list[Map]:
    """A map for each case whose forecast has cells."""
    cases: Mapping[str, Any] = report.facts.get("cases", {})
    specs = report.subject.get("cases", {})
    with_cells = {case: f["forecast"] for case, f in cases.items() if (f.get("forecast") or {}).get("cells")}
    return [_map(case, forecast, specs.get(case, {})) for case, forecast in list(with_cells.items())[:MOST]]


def _map(case: str, forecast: Mapping[str, Any], spec: Mapping[str, Any]) -> Map:
    memory = forecast["memory"]
    by_shape = {(cell["batch"], cell["seq_len"]): cell for cell in forecast["cells"]}
    lengths = tuple(sorted({length for _, length in by_shape}))
    on_gpu = forecast["device"] != "cpu"
    unit, scale = unit_of(median(cell["needed"] for cell in forecast["cells"]))
    return Map(
        case=case,
        memory=memory,
        device=" ".join(filter(None, [spec.get("gpu", ""), f"{memory / GIB:.4g} GiB"])),
        others={size: f"{size // GIB} GiB: {names}" for size, names in GPUS.items() if size != memory and on_gpu},
        requested=(forecast["batch"], forecast["seq_len"]),
        conditions=", ".join(_conditions(forecast)),
        unit=unit,
        lengths=lengths,
        rows={
            batch: tuple(_cell(by_shape.get((batch, length)), memory, scale) for length in lengths)
            for batch in sorted({batch for batch, _ in by_shape})
        },
    )


def _conditions(forecast: Mapping[str, Any]) -> Iterator[str]:
    yield with_checkpointing(forecast["mode"])
    yield f"autocast {forecast['autocast']}"
    yield forecast["chosen"]
    yield f"by {forecast['device']} kernels"
    if forecast["gpus"] > 1:
        yield f"on each of {forecast['gpus']} GPUs"


def _cell(cell: Mapping[str, int] | None, memory: int, scale: float) -> Cell:
    if cell is None:
        return Cell(0, 0, "none")
    fit: Fit = "over" if cell["needed"] > memory else "tight" if cell["short"] else "fits"
    return Cell(cell["needed"], cell["short"], fit, f"{cell['needed'] / scale:.1f}")
