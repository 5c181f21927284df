"""The memory table: what a model and a training step of it take, predicted or measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

GPUS_SHOWN = 5
GIB = 1 << 30


def table(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a case's facts: a heading and a text each."""
    told = facts.get("forecast")
    if told is None:
        yield from _measured(facts)
        return
    largest = sorted(told["groups"].items(), key=lambda g: -_nbytes(g[1]))
    parts = ", ".join(f"{name} {size(_nbytes(g))}" for name, g in largest[:3] if _nbytes(g))
    yield "weights", f"{size(told['loaded'])} as loaded ({parts})"
    others = {p: sum(g["upcast"].get(p, 0) for g in told["groups"].values()) for p in ("peft", "qlora")}
    yield "upcast", f"{size(told['upcast'])} under {told['profile']} (" + ", ".join(
        f"{profile}: {size(added)}" for profile, added in others.items() if profile != told["profile"]
    ) + ")"  # fmt: skip
    optimizer = told["optimizer"]
    yield (
        "adapters",
        (
            f"{size(told['adapters'])}, AdamW {size(optimizer['adamw'])} (8-bit {size(optimizer['adamw-8bit'])}, "
            f"paged {size(optimizer['paged-adamw'])} on the device)"
        ),
    )
    yield from _steps(facts, told)


def size(number: float) -> str:
    """Three figures and a decimal prefix."""
    return scaled(number, ("B", "kB", "MB", "GB", "TB"))


def scaled(number: float, units: tuple[str, ...]) -> str:
    """Three figures and one of the units, each a thousand times the one before."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}"


def _nbytes(group: Mapping[str, int]) -> int:
    return sum(group[name] for name in ("packed", "state", "unquantized", "buffers"))


def _steps(facts: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not told["activations"]:
        if told["missing"]:
            yield "a step", f"not predicted: {told['missing']}"
        return
    modes = "; ".join(
        f"{mode} {size(held['held'])} held, {size(held['peak'])} at the peak"
        for mode, held in told["activations"].items()
    )
    yield "a step", f"{told['batch']} × {told['seq_len']} tokens, checkpointing {modes}; logits {size(told['logits'])}"
    if "activations" in facts:
        yield "measured", dict(_measured(facts))["activations"]
    yield (
        "in all",
        f"{size(told['total'][told['mode']])} with {told['mode']} checkpointing, by {told['device']} kernels",
    )
    fitting = [
        f"{name} ({int(room) / GIB:.4g} GiB): {told['largest_batch'][room]:,} × {told['seq_len']} or 1 × {told['longest'][room]:,}"
        for room, name in told["rooms"].items()
        if told["largest_batch"][room]
    ]
    yield "fits", "; ".join(fitting[:GPUS_SHOWN]) or "none of the common GPUs"
    for note in told["notes"]:
        yield "note", note


def _measured(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "bytes_loaded" in facts:
        after = f" → {size(facts['bytes_prepared'])} after preparing" if "bytes_prepared" in facts else ""
        yield "weights", f"{size(facts['bytes_loaded'])}{after}"
    if "activations" in facts:
        shape = " × ".join(map(str, facts.get("batch", ())))
        held = f", {size(facts['checkpointed'])} checkpointed" if "checkpointed" in facts else ""
        yield "activations", f"{size(facts['activations'])}{held}" + (f" at {shape}" if shape else "")
