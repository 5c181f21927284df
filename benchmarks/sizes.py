"""What a full audit costs by the size of the model, and how fast rules and sweeps are.

Writes ``benchmarks/sizes.json`` and a plot, ``benchmarks/sizes.svg``.

Full audits are compared with the bare script on the same drawn weights, lean as they are themselves (one thread, no
compiler), the two taking turns. A model whose full audit the machine has no room for is audited from its configuration
alone, and its row says so. Given names of sizes, it measures those rows anew and keeps the others; each row says on
which processor it was measured.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import HERE, KBITCHECK, PACKAGES, measure, medians, processor, take_turns

CONFIGS = HERE.parent / "fixtures" / "configs"
SIZES = {"tiny": None, "135M": CONFIGS / "smollm-135m.json", "1.1B": CONFIGS / "tinyllama-1.1b.json"}
SWEPT = ("llama", "gpt2", "opt", "mixtral")


def by_size(name: str, config: Path | None) -> dict[str, Any]:
    """The audit of one model against the bare script: ratios of seconds and of peak memory."""
    from kbitcheck.models.sources.resolve import resolve

    model = "tiny:llama" if config is None else str(config)
    folder = str(resolve(model, random_weights=config is not None).checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        weights = ["--random-weights"] if config else []
        audit = [
            KBITCHECK,
            "model",
            model,
            "--quant",
            "nf4",
            *weights,
            "--timeout",
            "7200",
            "--format",
            "json",
            "--output",
            str(report),
        ]
        bare = [sys.executable, str(HERE / "bare.py"), folder]
        runs = take_turns({"lean": bare, "audit": audit}, 3 if config is None else 1, sample=True)
        saved = json.loads(report.read_text(encoding="utf-8"))
    summary = medians(runs)
    judged = [r for r in saved["results"] if r["status"] in ("PASS", "FAIL")]
    (facts,) = saved["facts"]["cases"].values()
    return {
        "model": name,
        "audit": facts.get("static", "full"),
        "rules": len(judged),
        "rules_per_second": round(len(judged) / summary["audit"]["seconds"], 2),
        "seconds_to_bare": round(summary["audit"]["seconds"] / summary["lean"]["seconds"], 2),
        "memory_to_bare": round(summary["audit"]["mib"] / summary["lean"]["mib"], 2),
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


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw the seconds of the audit and of the bare script beside each other, by model."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "sizes", "svg.fonttype": "none"})  # equal numbers, equal bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for offset, name, label in ((-0.2, "lean", "bare script"), (0.2, "audit", "audit")):
        seconds = [r["medians"][name]["seconds"] for r in rows]
        bars = axes.bar([place + offset for place in range(len(rows))], seconds, 0.4, label=label)
        axes.bar_label(bars, fmt="{:.0f} s", fontsize=8)
    ticks = [f"{r['model']}, {r['audit']}\ntime × {r['seconds_to_bare']}\nmemory × {r['memory_to_bare']}" for r in rows]
    axes.set_xticks(range(len(rows)), ticks, fontsize=8)
    axes.set(yscale="log", ylabel="seconds", title="An audit by all rules against one bare training step")
    axes.legend()
    figure.savefig(HERE / "sizes.svg", metadata={"Date": None})


def main(names: list[str]) -> int:
    """Measure the sizes of these names, all of them by default, and write."""
    if unknown := set(names) - set(SIZES):
        raise SystemExit(f"no such size: {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    file = HERE / "sizes.json"
    kept = {row["model"]: row for row in json.loads(file.read_text(encoding="utf-8"))["audits"]} if names else {}
    rows = [
        {"cpu": processor(), **by_size(name, config)} if not names or name in names else kept[name]
        for name, config in SIZES.items()
    ]
    results = {
        "environment": {"cpu": processor(), "cores": os.cpu_count(), **{name: version(name) for name in PACKAGES}},
        "audits": rows,
        "sweep": sweep_rate(),
    }
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(rows)
    for row in rows:
        print(row["model"], row["audit"], row["seconds_to_bare"], row["memory_to_bare"], row["rules_per_second"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
