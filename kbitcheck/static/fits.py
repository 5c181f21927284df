"""What fits: how a step's peak grows with batch and length, and the memory of common GPUs. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kbitcheck.core import UsageError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
GIB = 1 << 30

# Memory as sold, in GiB, as the vendors' data sheets give it.
GPUS: Mapping[int, str] = {
    16 * GIB: "T4",
    24 * GIB: "RTX 3090, RTX 4090, A10, L4",
    32 * GIB: "V100, RTX 5090",
    40 * GIB: "A100-40",
    48 * GIB: "L40S, RTX 6000 Ada",
    80 * GIB: "A100-80, H100",
    141 * GIB: "H200",
    180 * GIB: "B200",
}


def parse(text: str) -> int:
    """The bytes that ``24GiB``, ``24 GB``, ``24G`` (GiB, as GPUs are sold) or a bare number of bytes mean.

    Raises:
        UsageError: it is none of these, or nothing at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].upper() if found else "?"
    unit = f"{unit}IB" if unit in ("K", "M", "G", "T") else unit
    size = int(float(found[1]) * UNITS[unit]) if found and unit in UNITS else 0
    if size < 1:
        raise UsageError(f"--memory wants a size such as 24GiB, 80GB or 512MiB, not {text!r}")
    return size


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes of a step by batch and length: ``fixed + batch * (first + second * length + third * length**2)``.

    Every tensor of a step is of one of these sizes; ``first`` is what each sequence has beside its tokens (images).
    Where a larger step peaks in another place the real peak bends upwards: what is said to fit far from the shapes that
    were measured is then a little too large.
    """

    fixed: float
    first: float
    second: float
    third: float

    @classmethod
    def through(cls, length: int, peaks: Mapping[tuple[int, int], int]) -> Growth:
        """The growth through peaks by (batch, length): (1, full), (2, full), (1, twice), and (1, half) for images."""
        fixed = 2 * peaks[1, length] - peaks[2, length]
        slopes = {n: peaks[1, n] - fixed for n in (length, 2 * length)}
        half = length // 2
        if (1, half) in peaks:
            slopes[half] = peaks[1, half] - fixed
        else:
            slopes[0] = 0
        (x0, y0), (x1, y1), (x2, y2) = sorted(slopes.items())
        rise = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        third = (rise[1] - rise[0]) / (x2 - x0)
        second = rise[0] - third * (x0 + x1)
        return cls(fixed, y0 - second * x0 - third * x0**2, second, third)

    def peak(self, batch: int, length: int) -> float:
        """Bytes of one step."""
        return self.fixed + batch * (self.first + self.second * length + self.third * length**2)

    def largest_batch(self, length: int, room: int) -> int:
        """The most sequences of this length whose step takes at most ``room`` bytes; 0 where not one does."""
        each = self.peak(1, length) - self.fixed
        return max(int((room - self.fixed) // each), 0) if each > 0 else 0

    def longest(self, room: int, limit: int) -> int:
        """The longest single sequence, of at most ``limit`` tokens, whose step takes at most ``room`` bytes."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.peak(1, middle) <= room else (low, middle - 1)
        return low


def optimizers(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes that optimizers keep for float32 parameters of these sizes (numbers of elements).

    AdamW keeps two float32 numbers each. The 8-bit AdamW of bitsandbytes keeps two bytes, a float32 scale for every 256
    and two tables; parameters of fewer than 4096 elements stay 32-bit. Paged optimizers keep parameters of 100,000
    elements or more in pages, which can go to the host: ``paged`` is what cannot.
    """
    small, paged = 4096, 100_000
    eight = sum(8 * n if n < small else 2 * n + 2 * 4 * -(-n // 256) for n in sizes.values())
    tables = 2 * 256 * 4 if any(n >= small for n in sizes.values()) else 0
    return {
        "adamw": 8 * sum(sizes.values()),
        "adamw-8bit": eight + tables,
        "paged-adamw": sum(8 * n for n in sizes.values() if n < paged),
    }
