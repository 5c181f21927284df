"""The memory table: what a model and a training step of it take, predicted or measured."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from kbitcheck.core.profile import PROMISES
from kbitcheck.report.parts import fit
from kbitcheck.report.parts.units import size

GPUS_SHOWN = 6
NOTABLE = 0.02  # of a peak
MOSTLY_LOGITS = ", with copies of them most of the peak: see `--loss fused`, use_liger_kernel=True"
KEEP_SCORES = ("math", "eager")
GIB = 1 << 30


def rows(
    facts: Mapping[str, Mapping[str, Any]], specs: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, str]]:
    """Rows of all cases: a heading, the cases that have the rows under it ("" where all do, " " where those above do), and the text."""
    labels = _labels(list(facts), specs)
    blocks: dict[str, dict[tuple[tuple[str, str], ...], list[str]]] = {}
    for case, of_case in facts.items():
        for heading, block in _blocks(of_case).items():
            blocks.setdefault(heading, {}).setdefault(block, []).append(labels[case])
    for by_block in blocks.values():
        shown = False
        for block, of in by_block.items():
            for number, (heading, text) in enumerate(block):
                of_whom = "" if len(of) == len(facts) else " " if number else " and ".join(of)
                yield ("" if shown and not number else heading), of_whom, text
            shown = True


def _blocks(facts: Mapping[str, Any]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Rows of a case with their headings, by the heading that they stand under."""
    blocks: dict[str, tuple[tuple[str, str], ...]] = {}
    under = ""
    for heading, text in _table(facts):
        under = heading or under
        blocks[under] = (*blocks.get(under, ()), (heading, text))
    return blocks


def _labels(cases: Sequence[str], specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """How each case differs from the others: its model, quantization or checkpointing, as far as they differ."""
    names = ("model", "quant", "checkpointing")
    parts = {case: [str(specs.get(case, {}).get(name, case)) for name in names] for case in cases}
    differ = [i for i in range(3) if len({part[i] for part in parts.values()}) > 1]
    return {case: " ".join(dict.fromkeys(part[i] for i in differ)) for case, part in parts.items()}


def _table(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    forecast = facts.get("forecast")
    yield from _measured(facts) if forecast is None else _forecast(facts, forecast)
    if "losses" in facts:
        first, *_, last = facts["losses"]
        predicted = first + facts["predicted_changes"][-1]
        yield "trained", f"one step: loss {first:.4g} to {last:.4g} ({predicted:.4g} by the gradient alone)"
    if "drawn" in facts:
        yield "drawn", f"{facts['drawn']}: judged beside the case's own batch (KB310); another --seed draws another"
    for note in (forecast or {}).get("notes", ()):
        yield "note", note


def _forecast(facts: Mapping[str, Any], forecast: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from fit.answer(forecast)
    yield from fit.loading(forecast)
    largest = sorted(forecast["groups"].items(), key=lambda g: -_nbytes(g[1]))
    parts = ", ".join(f"{name} {size(_nbytes(g))}" for name, g in largest[:3] if _nbytes(g))
    yield "weights", f"{size(forecast['loaded'])} as loaded ({parts})"
    others = {p: sum(g["upcast"].get(p, 0) for g in forecast["groups"].values()) for p in ("peft", "qlora")}
    others.pop(forecast["profile"], None)
    under_others = ", ".join(f"{profile}: {size(added)}" for profile, added in others.items())
    yield "upcast", f"{size(forecast['upcast'])} under {forecast['profile']} ({under_others})"
    chosen = forecast.get("chosen", "adamw")
    optimizers = {name: size(nbytes) for name, nbytes in forecast["optimizer"].items()}
    beside = ", ".join(f"{n}: {nbytes}" for n, nbytes in optimizers.items() if nbytes != optimizers[chosen])
    yield (
        "adapters",
        f"{size(forecast['adapters'])}, and {optimizers[chosen]} for {chosen}" + f" ({beside})" * bool(beside),
    )
    yield from _steps(facts, forecast)


def _nbytes(group: Mapping[str, int]) -> int:
    return sum(group[name] for name in ("packed", "state", "unquantized", "buffers"))


def _steps(facts: Mapping[str, Any], forecast: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not forecast["activations"]:
        if forecast["missing"]:
            yield "a step", f"not predicted: {forecast['missing']}"
        return
    modes = "; ".join(
        f"{mode} {size(held['held'])} held, {size(held['peak'])} at the peak"
        for mode, held in forecast["activations"].items()
    )
    shape, logits = f"{forecast['batch']} × {forecast['seq_len']} tokens", size(forecast["logits"])
    mostly = MOSTLY_LOGITS * (
        6 * forecast["logits"] > forecast["activations"][forecast["mode"]]["peak"]
    )  # three, at the loss
    yield "a step", f"{shape}, checkpointing {modes}; logits {logits}{mostly}"
    yield from _kernels(forecast)
    if "activations" in facts:
        how = "under" if PROMISES[forecast["profile"]].autocast else "without"
        yield "measured", f"{dict(_measured(facts))['activations']}, {how} autocast, as rules judge it"
    mode = forecast["mode"]
    together = f", and gradients kept over {count} batches" if (count := forecast.get("accumulate", 1)) > 1 else ""
    taken = f"{size(forecast['total'][mode])} {fit.with_checkpointing(mode)}{together}"
    yield "in all", f"{taken}, by {forecast['device']} kernels"
    if forecast.get("reserved"):
        reserved = f"{size(forecast['reserved'])} reserved by CUDA's allocator, as simulated without a limit"
        yield (
            "",
            f"{reserved}; beside it about {size(forecast['overhead'])} of the CUDA context and cuBLAS, an estimate",
        )
    yield from fit.parts(forecast)
    yield from fit.gpus(forecast)
    if forecast.get("answer") is None or len(forecast["rooms"]) > 1:
        yield from zip(chain(["fits"], repeat("")), _fits(forecast), strict=False)


def _kernels(forecast: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Autocast and the kernels of attention, beside those without autocast where they differ."""
    if "compared" not in forecast:  # saved by an older version
        return
    own, mode = forecast["autocast"], forecast["mode"]
    peak = forecast["activations"][mode]["peak"]
    text = {"none": "none", "bf16": "bf16, as of Trainer(bf16=True)", "fp16": "fp16, as of Trainer(fp16=True)"}[own]
    for other, held in forecast["compared"].items():
        if abs(held["peak"] - peak) > NOTABLE * peak:
            advice = f": train with {other}=True" if other != "none" and held["peak"] < peak else ""
            text += f"; {_condition(other)} {size(held['peak'])} at the peak {fit.with_checkpointing(mode)}{advice}"
    yield "autocast", text
    kernels = {
        autocast: ", ".join(f"{kernel} in {count} layer{'s' * (count > 1)}" for kernel, count in counts.items())
        for autocast, counts in forecast["attention"].items()
    }
    if any(kernels.values()):
        text = kernels[own] or "no kernel of torch's"
        for other in forecast["compared"]:
            text += f"; {_condition(other)} {kernels[other]}" if kernels[other] != kernels[own] else ""
        scores = any(kernel.startswith(KEEP_SCORES) for counts in forecast["attention"].values() for kernel in counts)
        yield "attention", text + "; math and eager attention keep every score" * scores


def _condition(autocast: str) -> str:
    return "without autocast" if autocast == "none" else f"under {autocast}"


def _fits(forecast: Mapping[str, Any]) -> Iterator[str]:
    """The largest batch of each usual length, and the longest sequence, on the common GPUs: lines of a table."""
    if not forecast["longest"]:
        yield "not searched for: --memory 24GiB answers for one device, --fits for all common GPUs"
        return
    lengths = forecast.get("usual") or {str(forecast["seq_len"]): forecast["largest_batch"]}
    memory = str(forecast["memory"])
    fitting = [room for room in forecast["rooms"] if forecast["longest"][room] or room == memory]
    if not fitting:
        yield "none of the common GPUs"
        return
    heads = "".join(f"{length:>7}" for length in lengths)
    yield f"{'GiB':>6}{heads}    alone  largest batch by tokens, or the longest alone"
    for room in fitting[:GPUS_SHOWN]:
        batches = "".join(f"{largest[room]:>7,}" for largest in lengths.values())
        yield f"{int(room) / GIB:>6.4g}{batches}{forecast['longest'][room]:>9,}  {forecast['rooms'][room]}"


def _measured(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "bytes_loaded" in facts:
        after = f" → {size(facts['bytes_prepared'])} after preparing" if "bytes_prepared" in facts else ""
        yield "weights", f"{size(facts['bytes_loaded'])}{after}"
    if "activations" in facts:
        shape = " × ".join(map(str, facts.get("batch", ())))
        held = f", {size(facts['checkpointed'])} checkpointed" if "checkpointed" in facts else ""
        yield "activations", f"{size(facts['activations'])}{held}" + (f" at {shape}" if shape else "")
