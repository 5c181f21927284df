"""Sizes of memory: as users write them, as GPUs are sold, as optimizers fill them. No torch here."""

import re
from collections.abc import Mapping

from kbitcheck.core.errors import UsageError

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


def named(memory: int | None) -> dict[int, str]:
    """Names by size, from small to large: the GPUs, and the size that was requested."""
    requested = {memory: f"{GPUS[memory]} (given)" if memory in GPUS else "given"} if memory else {}
    return dict(sorted({**GPUS, **requested}.items()))


def parse(text: str) -> int:
    """The bytes that a text means: ``24GiB``, ``24 GB``, ``24G`` (GiB, as GPUs are sold) or a bare number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else "?"
    unit = f"{unit}IB" if unit in ("K", "M", "G", "T") else unit
    size = int(float(match[1]) * UNITS[unit]) if match and unit in UNITS else 0
    if size < 1:
        raise UsageError(f"--memory wants a size such as 24GiB, 80GB or 512MiB, not {text!r}")
    return size


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
