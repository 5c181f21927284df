"""Sizes of memory: as users write them, as GPUs are sold, as optimizers fill them. No torch here."""

import re
from collections.abc import Mapping

from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean

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

# Beside what torch's allocator gives out for tensors. Both are estimates:
# the context with torch's kernels takes 0.3 to 0.8 GB by device and versions (discuss.pytorch.org/t/81330), and
# cuBLAS takes up to 32 MiB for the thread of the forward and as much for that of the backward (results/gpu.json).
CUDA_CONTEXT = GIB // 2
CUBLAS_WORKSPACE = 64 << 20

# CUDA compute capabilities, from NVIDIA's tables: kernels of attention and dtypes of autocast depend on them.
CAPABILITIES: Mapping[str, tuple[int, int]] = {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100-40": (8, 0),
    "A100-80": (8, 0),
    "RTX 3090": (8, 6),
    "A10": (8, 6),
    "RTX 4090": (8, 9),
    "L4": (8, 9),
    "L40S": (8, 9),
    "RTX 6000 Ada": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "B200": (10, 0),
    "RTX 5090": (12, 0),
}


def gpu(text: str) -> str:
    """The GPU that a text names, as ``CAPABILITIES`` spells it; empty where it names none."""
    return next((name for name in CAPABILITIES if _plain(name) == _plain(text)), "")


def alike(size: int) -> str:
    """The GPUs with this memory that take the same kernels: the newer ones, where some are older than Ampere."""
    names = GPUS[size].split(", ")
    return ", ".join([name for name in names if CAPABILITIES[name] >= (8, 0)] or names)


def named(memory: int | None) -> dict[int, str]:
    """Names by size, from small to large: the GPUs, and the size that was requested."""
    requested = {memory: f"{GPUS[memory]} (given)" if memory in GPUS else "given"} if memory else {}
    return dict(sorted({**GPUS, **requested}.items()))


def parse(text: str) -> int:
    """The bytes that a text means: ``24GiB``, ``24 GB``, ``24G`` (GiB, as GPUs are sold), bytes, or those of a GPU: ``T4``."""
    if name := gpu(text):
        return next(size for size, names in GPUS.items() if name in names.split(", "))
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else "?"
    unit = f"{unit}IB" if unit in ("K", "M", "G", "T") else unit
    size = int(float(match[1]) * UNITS[unit]) if match and unit in UNITS else 0
    if size < 1:
        hint = did_you_mean(text, CAPABILITIES)
        raise UsageError(
            f"--memory wants a size such as 24GiB or 80GB, or a GPU such as T4 or A100-80, not {text!r}{hint}"
        )
    return size


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


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
