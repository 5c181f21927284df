"""What a full audit costs by the size of the model, and how fast rules and sweeps are.

Writes ``results/sizes.json``, a plot, ``docs/images/sizes.svg``, and the table of ``docs/cost.md``.

Full audits are compared with the bare script on the same drawn weights, both on one thread and without a compiler, the two
taking turns. A model whose full audit the machine has no room for is audited from its configuration alone, and its row
says so. Given labels of rows, such as ``135M-int8``, it measures those anew and keeps the others; each row says on which
processor it was measured.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import HERE, KBITCHECK, PACKAGES, PAGE, measure, medians, processor, publish, take_turns

CONFIGS = HERE.parent / "fixtures" / "configs"
PLOT = PAGE.parent / "images" / "sizes.svg"
START, END = "<!-- sizes:start -->", "<!-- sizes:end -->"
SWEPT = ("llama", "gpt2", "opt", "mixtral")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to audit, and the most that its audit may take, as ratios to the bare script."""

    model: str
    quant: str
    seconds: float
    memory: float
    repeats: int = 1


SMALL, LLAMA = str(CONFIGS / "smollm-135m.json"), str(CONFIGS / "tinyllama-1.1b.json")
SUBJECTS = {
    "tiny-nf4": Subject("tiny:llama", "nf4", seconds=1.3, memory=1.2, repeats=3),
    "135M-nf4": Subject(SMALL, "nf4", seconds=3.0, memory=1.25),
    "135M-int8": Subject(SMALL, "int8", seconds=3.0, memory=1.25),
    "1.1B-nf4": Subject(LLAMA, "nf4", seconds=3.0, memory=1.25),
}


def audited(label: str, subject: Subject) -> dict[str, Any]:
    """The audit of one model against the bare script: ratios of processor seconds and of peak memory."""
    from kbitcheck.models.sources.resolve import resolve

    drawn = subject.model.endswith(".json")
    folder = str(resolve(subject.model, random_weights=drawn).checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        audit = [
            KBITCHECK,
            # What the bare script loads: it does not draw the weights either.
            *("model", folder if drawn else subject.model, "--quant", subject.quant),
            *("--timeout", "7200", "--format", "json", "--output", str(report)),
        ]
        bare = [sys.executable, str(HERE / "bare.py"), folder, subject.quant]
        runs = take_turns({"lean": bare, "audit": audit}, subject.repeats, sample=True)
        saved = json.loads(report.read_text(encoding="utf-8"))
    summary = medians(runs)
    judged = [r for r in saved["results"] if r["status"] in ("PASS", "FAIL")]
    (facts,) = saved["facts"]["cases"].values()
    ratios = {
        key: round(summary["audit"][unit] / summary["lean"][unit], 2)
        for key, unit in (("seconds_to_bare", "seconds"), ("memory_to_bare", "mib"))
    }
    return {
        "cpu": processor(),
        "label": label,
        "audit": facts.get("static", "full"),
        "rules": len(judged),
        **ratios,
        "targets": {"seconds_to_bare": subject.seconds, "memory_to_bare": subject.memory},
        "medians": summary,
    }


def sweep_rate() -> dict[str, Any]:
    """Architectures a minute on one core, imports of the first included."""
    with tempfile.TemporaryDirectory() as scratch:
        chosen = [word for name in SWEPT for word in ("--select", name)]
        out = str(Path(scratch) / "table.json")
        command = [KBITCHECK, "sweep", *chosen, "--jobs", "1", "--format", "json", "--output", out]
        took = measure(command, {}, sample=False)
    return {"architectures": len(SWEPT), "per_minute": round(60 * len(SWEPT) / took.seconds, 1)}


def plot(rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the processor seconds of the audit and of the bare script beside each other, by model."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "sizes", "svg.fonttype": "none"})  # equal numbers, equal bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for offset, name, label in ((-0.2, "lean", "bare script"), (0.2, "audit", "audit")):
        seconds = [r["medians"][name]["seconds"] for r in rows]
        bars = axes.bar([place + offset for place in range(len(rows))], seconds, 0.4, label=label)
        axes.bar_label(bars, fmt="{:.0f} s", fontsize=8)
    ticks = [f"{r['label']}\ntime × {r['seconds_to_bare']}\nmemory × {r['memory_to_bare']}" for r in rows]
    axes.set_xticks(range(len(rows)), ticks, fontsize=8)
    title = "An audit by all rules against one bare training step"
    axes.set(yscale="log", ylabel="seconds of one processor", title=title)
    axes.legend()
    figure.savefig(PLOT, metadata={"Date": None})


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ratios beside their targets, as Markdown."""
    lines = ["| model | audit | rules judged | time | target | memory | target |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["label"], row["audit"], str(row["rules"])]
        for key, most in row["targets"].items():
            met = row[key] <= most
            cells += [f"{row[key]:.2f}" if met else f"**{row[key]:.2f}**", f"{most:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    took = [
        f"{row['label']} {row['medians']['lean']['seconds']:.1f} s and {row['medians']['lean']['mib']:.0f} MiB"
        for row in rows
    ]
    return "\n".join([*lines, "", f"The bare script took: {', '.join(took)} ({', '.join({r['cpu'] for r in rows})})."])


def main(labels: Sequence[str]) -> int:
    """Measure the rows of these labels, all of them by default, and write."""
    if unknown := set(labels) - set(SUBJECTS):
        raise SystemExit(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    file = HERE.parent / "results" / "sizes.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    results["environment"] = {
        "cpu": processor(), "cores": os.cpu_count(), **{name: version(name) for name in PACKAGES}
    }  # fmt: skip
    rows = {row["label"]: row for row in results["audits"]} if labels else {}
    for label in labels or SUBJECTS:
        rows[label] = audited(label, SUBJECTS[label])
        results["audits"] = [rows[each] for each in SUBJECTS if each in rows]
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")  # a large one may not end
    if not labels:
        results["sweep"] = sweep_rate()
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results["audits"])
    publish(START, table(results["audits"]), END)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
