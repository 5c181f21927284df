"""Predicted against allocated, at full size with random weights: writes ``results/gpu.json`` and a plot, ``gpu.svg``.

Run it by ``make gpu``. Nothing is downloaded. Without a CUDA device it tells the predictions, and writes nothing.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.sources.resolve import Source, resolve
from kbitcheck.observe.forecast import predict as forecast
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.probes import adapters, step, switches
from kbitcheck.observe.probes.live import Live, own_tensors
from kbitcheck.observe.probes.memory import empty_cache
from kbitcheck.observe.probes.snapshot import snapshot

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "fixtures" / "configs"
RESULTS = HERE.parent / "results" / "gpu.json"
MODES = ("off", "reentrant", "non-reentrant")
NOT_MEASURED = "not measured"
TIMED_STEPS = 3
CLOSE = 0.05
# Drawn activations have an outlier in almost every column, a trained model's in about one of a thousand (LLM.int8,
# Dettmers et al. 2022, section 4). Predictions are for none.
NO_OUTLIERS = 1e4
CONFORMANCE = (("reference", "nf4"), ("reference", "nf4,double", "fp4"), ("reference", "int8"), ("peft",))


@dataclass(frozen=True, slots=True)
class Plan:
    """One model whose steps are measured. ``shapes`` are batches and lengths."""

    model: str
    quant: str
    shapes: tuple[tuple[int, int], ...]
    rank: int = 16


PLANS = (
    Plan(str(CONFIGS / "tinyllama-1.1b.json"), "nf4", ((1, 2048), (4, 1024))),
    Plan(str(CONFIGS / "llama-2-7b.json"), "nf4", ((1, 2048), (4, 1024))),
    Plan(str(CONFIGS / "llama-2-7b.json"), "int8", ((1, 2048), (4, 1024))),
)


class Meter:
    """Bytes on a device, of which ``existing`` tensors were there before; storages where it is a CPU.

    CUDA's allocator counts what was asked of it, and what it gave, which may be up to a mebibyte more for a large tensor.
    """

    def __init__(self, device: str, *existing: torch.Tensor) -> None:
        self._live = None if device.startswith("cuda") else Live(existing)

    def __enter__(self) -> Meter:
        if self._live is None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._live.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*raised)

    @property
    def asked(self) -> int:
        """Bytes asked for and still in use."""
        return _told("requested_bytes.all.current") if self._live is None else self._live.now

    @property
    def most_asked(self) -> int:
        """The most that was in use, since it was entered."""
        return _told("requested_bytes.all.peak") if self._live is None else self._live.peak

    @property
    def peak(self) -> int:
        """The most that was given."""
        return _told("allocated_bytes.all.peak") if self._live is None else self._live.peak


def _told(name: str) -> int:
    return int(torch.cuda.memory_stats()[name])


def predicted(source: Source, plan: Plan, device: str) -> dict[str, Any]:
    """What the static audit tells: sizes, and the peak of each step by mode and shape."""
    spec = CaseSpec(
        model=plan.model,
        quant=plan.quant,
        implementation="reference",
        rank=plan.rank,
        adapters="reference",
        device=device,
    )
    empty = source.meta(Quantization.parse(plan.quant))
    facts = snapshot(empty)
    told = forecast.of_weights(empty, facts, spec)
    runtime = Runtime(device="cpu" if told.device == "cpu" else "cuda", keeps_output=True)  # as ``measured`` trains
    run = forecast.Training(source, empty, facts, spec, runtime)
    steps = {
        f"{mode} {batch} x {length}": told.resident
        + max(run.step(batch, length, mode, padded=False).peak, told.adapters)
        for mode in MODES
        for batch, length in plan.shapes
    }
    largest = max(t.nbytes for t in facts.parameters.values())
    return {
        "parameters": told.parameters, "loaded": told.loaded, "upcast": told.upcast, "resident": told.resident,
        "largest": largest, "steps": steps,
    }  # fmt: skip


def measured(source: Source, plan: Plan, device: str) -> dict[str, Any]:
    """The same of a real model on a device, with what preparing took and the seconds of each step."""
    with Meter(device) as loading:
        model: Any = source.load(Quantization.parse(plan.quant), device)
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.state.threshold = NO_OUTLIERS
    found: dict[str, Any] = {"loaded": loading.asked, "loading_peak": loading.most_asked}
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    with Meter(device, *own_tensors(model)) as preparing:
        prepare_model_for_kbit_training(model, True, {"use_reentrant": False})
    found |= {"prepared": preparing.asked, "preparing_peak": preparing.most_asked}
    if device.startswith("cuda"):
        found["cached_after_preparing"] = empty_cache()
    targets = adapters.target_layers(model, "all-linear")
    wrapped, owned = adapters.attach(model, targets, library="reference", rank=plan.rank, seed=0)
    optimizer = torch.optim.AdamW(owned.values(), lr=1e-5)
    wrapped.train()
    found["steps"] = dict(_steps(source, plan, model, wrapped, optimizer, device))
    return found


def _steps(
    source: Source, plan: Plan, model: Any, wrapped: Any, optimizer: torch.optim.Optimizer, device: str
) -> Iterator[tuple[str, dict[str, float]]]:
    for mode in MODES:
        _switch(model, mode)
        for batch, length in plan.shapes:
            fed = source.batch(model, batch=batch, seq_len=length)
            fed.pop("attention_mask", None)  # nothing is padded
            workspace = _step(wrapped, fed, optimizer, device)  # warms up
            states = (t for s in optimizer.state.values() for t in s.values() if t.dim())
            seconds = []
            with Meter(device, *own_tensors(model), *states) as meter:
                for _ in range(TIMED_STEPS):
                    start = time.perf_counter()
                    _step(wrapped, fed, optimizer, device)
                    seconds.append(time.perf_counter() - start)
            took = {"peak": meter.peak - workspace, "workspace": workspace, "seconds": statistics.median(seconds)}
            yield f"{mode} {batch} x {length}", took


def _step(wrapped: Any, fed: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, device: str) -> int:
    """One training step; returns the bytes of cuBLAS's workspaces, which torch's allocator counts."""
    with switches.cache_off(wrapped):
        output = wrapped(**step.feed(wrapped, fed))
        output.loss.backward()
    del output  # held till here, logits and all, as a plain loop does
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not device.startswith("cuda"):
        return 0
    torch.cuda.synchronize()
    with_them = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return with_them - torch.cuda.memory_allocated()


def _switch(model: Any, mode: str) -> None:
    if mode == "off":
        switches.quietly(model.gradient_checkpointing_disable)
    else:
        kwargs = {"use_reentrant": mode == "reentrant"}
        switches.quietly(lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs))


def row(plan: Plan, device: str) -> dict[str, Any]:
    """A plan, its predictions and what was measured on the device, if it is there."""
    source = resolve(plan.model, random_weights=True)
    there = not device.startswith("cuda") or torch.cuda.is_available()
    told: dict[str, Any] = {
        "model": Path(plan.model).stem, "quant": plan.quant, "rank": plan.rank,
        "predicted": predicted(source, plan, device), "measured": NOT_MEASURED,
    }  # fmt: skip
    if there:
        told["measured"] = found = measured(source, plan, device)
        apart = (found["steps"][name]["peak"] / peak - 1 for name, peak in told["predicted"]["steps"].items())
        told["worst_percent"] = round(100 * max(map(abs, apart)), 2)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return told


def conformance() -> Iterator[dict[str, Any]]:
    """How implementations fare under all rules on the device's kernels."""
    for implementation, *quants in CONFORMANCE:
        command = ["impl", implementation, *(word for q in quants for word in ("--quant", q)), "--device", "cuda"]
        with tempfile.TemporaryDirectory() as scratch:
            output = ["--format", "json", "--output", f"{scratch}/report.json"]
            ran = subprocess.run([sys.executable, "-m", "kbitcheck", *command, *output], check=False)
            report = json.loads(Path(scratch, "report.json").read_text(encoding="utf-8"))
        broken = {
            r["rule"]: r["failures"][0].get("party", "implementation")
            for r in report["results"]
            if r["status"] == "FAIL"
        }
        yield {
            "command": " ".join(["kbitcheck", *command]), "exit_code": ran.returncode, "cases": len(report["facts"]["cases"]),
            "summary": report["summary"], "broken": broken,
        }  # fmt: skip


def plot(told: Mapping[str, Any]) -> None:
    """Draw every step's peak, predicted and measured, and what its checkpointing costs in time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {"svg.hashsalt": "gpu", "svg.fonttype": "none"}
    )  # equal numbers, equal bytes; letters as letters
    from matplotlib import pyplot

    steps = [(r, name) for r in told["rows"] for name in r["predicted"]["steps"]]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(steps) + 1), layout="constrained")
    for place, (r, name) in enumerate(steps):
        measured = r["measured"]["steps"]
        peak, predicted = measured[name]["peak"] / 2**30, r["predicted"]["steps"][name] / 2**30
        slower = measured[name]["seconds"] / measured["off " + name.partition(" ")[2]]["seconds"]
        axes.barh(place, peak, color="tab:blue", label="measured" if place == 0 else None)
        axes.plot([predicted] * 2, [place - 0.4, place + 0.4], color="black", label="predicted" if place == 0 else None)
        told_beside = f"{peak:.2f} GiB, time × {slower:.2f}"
        axes.annotate(told_beside, (peak, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(steps)), [f"{r['model']} {r['quant']}, {name}" for r, name in steps], fontsize=8)
    axes.set(xlabel="GiB at the peak of a step", title=f"Training steps on one {told['device']}")
    axes.set(xlim=(0, 1.4 * axes.get_xlim()[1]), ylim=(len(steps) - 0.4, -0.6))
    axes.legend(loc="lower right")
    figure.savefig(HERE / "gpu.svg", metadata={"Date": None})


def main() -> int:
    """Measure, write, and say whether the predictions hold."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 tells of each cast
    rows = []
    for plan in PLANS:
        start = time.perf_counter()
        rows.append(row(plan, "cuda"))
        rows[-1]["took_seconds"] = round(time.perf_counter() - start)
        print(rows[-1]["model"], plan.quant, rows[-1].get("worst_percent", NOT_MEASURED), flush=True)
    if not torch.cuda.is_available():
        return 0
    told: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {p: version(p) for p in ("torch", "transformers", "bitsandbytes", "peft")},
        "rows": rows,
        "conformance": list(conformance()),
    }
    RESULTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    plot(told)
    far = any(r["worst_percent"] > 100 * CLOSE for r in rows)
    return int(far or any(c["exit_code"] for c in told["conformance"]))


if __name__ == "__main__":
    sys.exit(main())
