"""Pages of what was measured beside rules: trainers, memory, time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from result_tables import read, sortable

from kbitcheck.core.rule import rules
from kbitcheck.report.parts.sortable import Cell, Sortable
from kbitcheck.report.parts.units import size

BY = {"implementation": "the trainer", "stack": "the stack", "model": "the model"}
STACK = ("transformers", "peft", "bitsandbytes")


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of each."""
    yield "results/trainers.md", _trainers()
    yield "results/memory-and-time.md", _memory_and_time()


def _trainers() -> str:
    rows = [_trainer(name, row) for name, row in read("trainers.json").items()]
    table = Sortable(
        caption="Trainers and rules",
        columns=("trainer", "version", *STACK, "norms", "adapters", "optimizer", "kept", "broken"),
        rows=rows,
    )
    out = [
        "# Trainers and rules\n",
        "Real runs of each trainer's own command: a tiny Llama in 4 bits, three steps on a CPU, watched from inside. What each run does,",
        "with its command and configuration, is on [a page of its own](../trainers.md).\n",
        sortable(table, "table-trainers"),
        "",
    ]
    return "\n".join(out)


def _trainer(name: str, row: Mapping[str, Any]) -> list[Cell]:
    versions, watched = row["versions"], row["watched"]
    dtypes = {what.partition(" of ")[0]: ", ".join(seen) for what, seen in watched["dtypes"].items()}
    own = next(version for package, version in versions.items() if package not in (*STACK, "torch"))
    broken = [f"{rules().title(b['rule'])} ({b['level']}, by {BY[b['attributed_to']]})" for b in row["broken"]]
    worst = "must" if any(b["level"] == "MUST" for b in row["broken"]) else "should" if broken else "kept"
    anchor = row["trainer"].lower().replace(" ", "-")
    return [
        Cell(row["trainer"], link=f"../trainers.html#{anchor}"),
        Cell(own),
        *(Cell(versions.get(package, "")) for package in STACK),
        Cell(dtypes["norms"]),
        Cell(dtypes["adapters"]),
        Cell(", ".join(watched["optimizers"])),
        Cell(str(row["passed"])),
        Cell("; ".join(broken) or "nothing", worst),
    ]


def _memory_and_time() -> str:
    gpu, sizes, bench = read("gpu.json"), read("sizes.json"), read("bench.json")
    versions = ", ".join(f"{package} {version}" for package, version in gpu["versions"].items())
    memory = Sortable(
        caption="Forecast beside allocated",
        columns=("model", "quantization", "checkpointing", "batch", "forecast", "allocated", "off by", "a step"),
        rows=[cells for row in gpu["rows"] for cells in _steps(row)],
        chosen=("model", "quantization", "checkpointing"),
    )
    time = Sortable(
        caption="What an audit costs",
        columns=("audit", "processor", "rules", "time", "target", "memory", "target of memory"),
        rows=[_audit(each) for each in sizes["audits"]],
    )
    commands = Sortable(
        caption="What a command costs",
        columns=("what", "beside", "ratio", "target"),
        rows=[_ratio(each) for each in bench["ratios"]],
    )
    out = [
        "# Memory and time\n",
        "## Forecasts beside a GPU\n",
        f"The peak of one training step, forecast from the configuration alone and allocated on {gpu['device']} ({versions}).",
        "[How sizes are predicted](../static.md#how-it-is-predicted).\n",
        sortable(memory, "table-memory"),
        "\n## Audits\n",
        "Beside a bare script that loads the same model, prepares it and takes one training step; times are of the processor.",
        "[How this is measured](../cost.md).\n",
        sortable(time, "table-audits"),
        "\n## Commands\n",
        sortable(commands, "table-commands"),
        "",
    ]
    return "\n".join(out)


def _steps(row: Mapping[str, Any]) -> Iterator[list[Cell]]:
    for step, seen in row["measured"]["steps"].items():
        mode, _, batch = step.partition(" ")
        forecast, peak = row["predicted"]["steps"][step], seen["peak"]
        yield [
            Cell(row["model"]),
            Cell(row["quant"]),
            Cell(mode),
            Cell(batch.replace("x", "×")),
            Cell(size(forecast), key=str(forecast)),
            Cell(size(peak), key=str(peak)),
            Cell(f"{100 * (forecast - peak) / peak:+.2f} %"),
            Cell(f"{seen['seconds']:.2f} s"),
        ]


def _audit(each: Mapping[str, Any]) -> list[Cell]:
    def beside(what: str) -> list[Cell]:
        ratio, target = each[what], each["targets"][what]
        return [Cell(f"{ratio:.2f}", "should" if ratio > target else "kept"), Cell(f"{target}")]

    return [
        Cell(f"{each['label']}, {each['audit']}"),
        Cell(each["cpu"]),
        Cell(str(each["rules"])),
        *beside("seconds_to_bare"),
        *beside("memory_to_bare"),
    ]


def _ratio(each: Mapping[str, Any]) -> list[Cell]:
    state = "kept" if each["met"] else "should"
    return [
        Cell(each["what"].replace("`", "")),
        Cell(each["to"].replace("`", "")),
        Cell(f"{each['ratio']:.2f}", state),
        Cell(f"{each['target']}"),
    ]
