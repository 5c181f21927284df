"""The memory table: what a model and a training step of it take, predicted or measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GPUS_SHOWN = 6
GIB = 1 << 30


def rows(
    facts: Mapping[str, Mapping[str, Any]], specs: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, str]]:
    """Rows of all cases: a heading, the cases it is told of ("" where it is the same for all), and a text each."""
    labels = _labels(list(facts), specs)
    told: dict[tuple[str, int], dict[str, list[str]]] = {}
    for case, found in facts.items():
        seen: Counter[str] = Counter()
        for heading, text in table(found):
            told.setdefault((heading, seen[heading]), {}).setdefault(text, []).append(labels[case])
            seen[heading] += 1
    for (heading, _), texts in told.items():
        for number, (text, of) in enumerate(texts.items()):
            yield heading if not number else "", "" if len(of) == len(facts) else " and ".join(of), text


def _labels(cases: Sequence[str], specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What tells each case from the others: its model, quantization or checkpointing, as far as they differ."""
    parts = {
        case: [str(specs.get(case, {}).get(n, case)) for n in ("model", "quant", "checkpointing")] for case in cases
    }
    differ = [i for i in range(3) if len({part[i] for part in parts.values()}) > 1]
    return {case: " ".join(dict.fromkeys(part[i] for i in differ)) for case, part in parts.items()}


def table(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a case's facts: a heading and a text each."""
    told = facts.get("forecast")
    if told is None:
        yield from _measured(facts)
        yield from _trained(facts)
        return
    largest = sorted(told["groups"].items(), key=lambda g: -_nbytes(g[1]))
    parts = ", ".join(f"{name} {size(_nbytes(g))}" for name, g in largest[:3] if _nbytes(g))
    yield "weights", f"{size(told['loaded'])} as loaded ({parts})"
    profiles = {p: sum(g["upcast"].get(p, 0) for g in told["groups"].values()) for p in ("peft", "qlora")}
    yield "upcast", f"{size(told['upcast'])} under {told['profile']} (" + ", ".join(
        f"{profile}: {size(added)}" for profile, added in profiles.items() if profile != told["profile"]
    ) + ")"  # fmt: skip
    optimizer = told["optimizer"]
    others = f" (8-bit {size(optimizer['adamw-8bit'])}, paged {size(optimizer['paged-adamw'])} on the device)"
    differ = len(set(optimizer.values())) > 1
    yield "adapters", f"{size(told['adapters'])}, AdamW {size(optimizer['adamw'])}{others if differ else ''}"
    yield from _steps(facts, told)
    yield from _trained(facts)
    for note in told["notes"]:
        yield "note", note


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
    heading = "fits"
    for line in _fits(told):
        yield heading, line
        heading = ""


def _trained(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "losses" in facts:
        first, *_, last = facts["losses"]
        steps = len(facts["losses"]) - 1
        twin = facts["twin_losses"][-1]
        yield (
            "trained",
            f"{steps} steps on one batch: loss {first:.4g} to {last:.4g} (the float64 twin's to {twin:.4g})",
        )


def _fits(told: Mapping[str, Any]) -> Iterator[str]:
    """The largest batch of each usual length, and the longest sequence, on the GPUs there are: lines of a table."""
    smallest = min(told["rooms"], key=int)
    if not told["longest"]:  # nobody would ask
        yield (
            f"any common GPU: this takes less than 1 % of the smallest, {told['rooms'][smallest]} ({int(smallest) / GIB:.4g} GiB)"
        )
        return
    lengths = told.get("usual") or {str(told["seq_len"]): told["largest_batch"]}
    given = str(told["memory"])
    fitting = [room for room in told["rooms"] if told["longest"][room] or room == given]
    if not fitting:
        yield "none of the common GPUs"
        return
    yield (
        f"{'GiB':>6}"
        + "".join(f"{length:>7}" for length in lengths)
        + "    alone  largest batch by tokens, or the longest alone"
    )
    for room in fitting[:GPUS_SHOWN]:
        batches = "".join(f"{found[room]:>7,}" for found in lengths.values())
        yield f"{int(room) / GIB:>6.4g}{batches}{told['longest'][room]:>9,}  {told['rooms'][room]}"


def _measured(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "bytes_loaded" in facts:
        after = f" → {size(facts['bytes_prepared'])} after preparing" if "bytes_prepared" in facts else ""
        yield "weights", f"{size(facts['bytes_loaded'])}{after}"
    if "activations" in facts:
        shape = " × ".join(map(str, facts.get("batch", ())))
        held = f", {size(facts['checkpointed'])} checkpointed" if "checkpointed" in facts else ""
        yield "activations", f"{size(facts['activations'])}{held}" + (f" at {shape}" if shape else "")
