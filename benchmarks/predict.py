"""What the static audit costs, and how far its predictions are from real steps.

Writes ``results/predicted.json``, and a plot of it, ``benchmarks/predicted.svg``.

Each configuration is audited in a process of its own, through the command line, imports included; its CPU seconds and
peak memory are of all its processes. The grid compares predicted activations with the storages of real CPU steps.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parent / "fixtures" / "configs").glob("*.json"))
DEPTHS = (2, 8)  # of a Llama, beside each family's own
FAMILIES = ("llama", "gpt2", "t5", "mixtral", "llava", "qwen3", "gemma", "opt", "bert", "whisper")
SHAPES = ((1, 16), (2, 64))
QUANTS = ("nf4", "int8")
IMPORTS = [sys.executable, "-c", "import torch, transformers, bitsandbytes"]
MEMORY = "24GiB"
CELLS = 2  # that a memory size prints: the largest batch and the longest sequence
# Processor time: so many times that of the imports and a second, and so many times more for each printed cell.
LIMITS = {"times": 1.5, "times_for_a_cell": 0.3, "gib": 1.0, "held_percent": 2.0, "peak_percent": 5.0}
KINDS = {"held": ("plain", "held"), "peak": ("plain_peak", "peak")}


@dataclasses.dataclass(frozen=True, slots=True)
class Used:
    """What a command and its children printed and used."""

    text: str
    cpu_seconds: float
    peak_rss_gib: float


def used(command: list[str]) -> Used:
    """Run a command in a process of its own, whose children are the command's alone."""
    code = (
        "import json, resource, subprocess, sys\n"
        f"out = subprocess.run({command!r}, capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([out.stdout, used.ru_utime + used.ru_stime, used.ru_maxrss]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, seconds, kilobytes = json.loads(ran.stdout)
    return Used(text, seconds, kilobytes / (1 << 20))


def audited(config: Path) -> dict[str, Any]:
    """One static audit: its cost beside that of the imports, without and with a memory size, and the sizes it predicts."""
    command = [sys.executable, "-m", "kbitcheck", "model", str(config), "--static", "--format", "json"]
    imports, plain, fitted = used(IMPORTS), used(command), used([*command, "--memory", MEMORY])
    report = json.loads(plain.text)
    (prediction,) = (facts["forecast"] for facts in report["facts"]["cases"].values())
    kept = ("parameters", "loaded", "upcast", "adapters", "batch", "seq_len", "activations", "total", "longest")
    return {
        "config": config.stem,
        "imports_cpu_seconds": round(imports.cpu_seconds, 2),
        "cpu_seconds": round(plain.cpu_seconds, 2),
        "times_imports": round((plain.cpu_seconds - 1) / imports.cpu_seconds, 2),
        "with_memory_cpu_seconds": round(fitted.cpu_seconds, 2),
        "with_memory_times_imports": round((fitted.cpu_seconds - 1) / imports.cpu_seconds, 2),
        "peak_rss_gib": round(plain.peak_rss_gib, 3),
        **{name: prediction[name] for name in kept},
    }


def worst(pairs: Iterable[tuple[int, int]]) -> float:
    """The largest distance of predicted from measured, in percent."""
    return round(max(abs(predicted / measured - 1) for predicted, measured in pairs) * 100, 3)


def grid() -> list[dict[str, Any]]:
    """Predicted and measured activations of real CPU steps."""
    import torch
    from kbitcheck_reference import prepare_model_for_kbit_training

    from kbitcheck.backends.quantization import Quantization
    from kbitcheck.core.cases import CaseSpec
    from kbitcheck.models.sources.resolve import resolve
    from kbitcheck.observe.forecast import predict as forecast
    from kbitcheck.observe.forecast import weights
    from kbitcheck.observe.forecast.runtime import Runtime
    from kbitcheck.observe.probes import adapters, memory, step, switches
    from kbitcheck.observe.probes.live import own_tensors
    from kbitcheck.observe.probes.snapshot import snapshot

    torch.set_num_threads(1)
    rows = []
    sources: dict[str, Any] = {family: resolve(f"tiny:{family}") for family in FAMILIES}
    llama = sources["llama"]
    for depth in DEPTHS:
        config = {**llama.config, "num_hidden_layers": depth}
        sources[f"llama, {depth} blocks"] = dataclasses.replace(llama, config=config, unread={})
    for family, source in sources.items():
        for quant in QUANTS:
            wanted = Quantization.parse(quant)
            base = source.load(wanted)
            real_weights = sum(g.parameters for g in weights.groups(base, snapshot(base)).values())
            stored = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own_tensors(base)}
            for mode in ("reentrant", "non-reentrant"):
                spec = CaseSpec(model=source.name, quant=quant, implementation="reference", checkpointing=mode)  # type: ignore[arg-type]
                empty = source.meta(wanted)
                facts = snapshot(empty)
                predicted = forecast.of_weights(empty, facts, spec)
                run = forecast.Training(source, empty, facts, spec, Runtime(device="cpu", keeps_output=True))
                model: Any = copy.deepcopy(base)
                prepare_model_for_kbit_training(model, True, {"use_reentrant": mode == "reentrant"})
                targets = adapters.target_layers(model, spec.targets)
                model, owned = adapters.attach(model, targets, library="reference", rank=spec.rank, seed=0)
                for batch, length in SHAPES:
                    made = source.batch(base, batch=batch, seq_len=length)
                    step.train_step(model, made, owned)
                    real = memory.activations(model, made, seed=0)
                    with switches.checkpointing_off(model):
                        peak_plain = memory.measure(model, made, 0).peak
                    plain, held = run.step(batch, length, "off"), run.step(batch, length, mode)
                    pairs = {
                        "plain": (plain.held, real.plain),
                        "plain_peak": (plain.peak, peak_plain),
                        "held": (held.held, real.held),
                        "peak": (held.peak, real.peak),
                    }
                    rows.append(
                        {"family": family, "quant": quant, "mode": mode, "batch": batch, "seq_len": length}
                        | {"parameters": {"predicted": predicted.parameters, "measured": real_weights}}
                        | {"bytes": {"predicted": predicted.loaded, "measured": sum(stored.values())}}
                        | {name: {"predicted": p, "measured": m} for name, (p, m) in pairs.items()}
                        | {f"{kind}_percent": worst(pairs[name] for name in names) for kind, names in KINDS.items()}
                    )
                    print(
                        family,
                        quant,
                        mode,
                        batch,
                        length,
                        rows[-1]["held_percent"],
                        rows[-1]["peak_percent"],
                        flush=True,
                    )
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw predicted against measured bytes of every step."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "predicted"  # equal numbers, equal bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    for name in ("plain", "plain_peak", "held", "peak"):
        axes.loglog(
            [r[name]["measured"] for r in rows], [r[name]["predicted"] for r in rows], ".", label=name.replace("_", " ")
        )
    ends = [min(r["held"]["measured"] for r in rows), max(r["plain_peak"]["measured"] for r in rows)]
    axes.plot(ends, ends, color="grey", linewidth=0.5)
    axes.set(xlabel="bytes measured", ylabel="bytes predicted", title="Activations of real steps on a CPU")
    axes.legend()
    figure.savefig(HERE / "predicted.svg", metadata={"Date": None})


def main() -> int:
    """Measure, write, and say whether the limits hold."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    configs = [audited(config) for config in CONFIGS]
    for row in configs:
        times = row["times_imports"], row["with_memory_times_imports"]
        print(
            row["config"],
            f"{row['parameters']:,}",
            row["cpu_seconds"],
            "s",
            *times,
            row["peak_rss_gib"],
            "GiB",
            flush=True,
        )
    rows = grid()
    versions = {p: metadata.version(p) for p in ("torch", "transformers", "bitsandbytes", "peft")}
    results = {"versions": versions, "limits": LIMITS, "configs": configs, "cpu": rows, "cuda": "see gpu.json"}
    (HERE.parent / "results" / "predicted.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(rows)
    fitted = LIMITS["times"] + CELLS * LIMITS["times_for_a_cell"]
    over = [
        r["config"]
        for r in configs
        if r["times_imports"] > LIMITS["times"]
        or r["with_memory_times_imports"] > fitted
        or r["peak_rss_gib"] > LIMITS["gib"]
    ]
    exact = ("parameters", "bytes")
    far = sum(
        any(r[f"{kind}_percent"] > LIMITS[f"{kind}_percent"] for kind in KINDS)
        or any(r[name]["predicted"] != r[name]["measured"] for name in exact)
        for r in rows
    )
    print(
        f"{len(over)} of {len(configs)} configurations over the limits; {far} of {len(rows)} steps further off than allowed"
    )
    return bool(over or far)


if __name__ == "__main__":
    sys.exit(main())
