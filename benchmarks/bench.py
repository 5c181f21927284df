"""What kbitcheck costs, as ratios to a bare script, measured in one run; run it by ``make bench``.

The commands of a group take turns, so that a slow minute of the machine hurts them alike, and medians are compared.
Seconds are those of the processor, user and system, of the whole process tree, so that other work on the machine counts less.
Memory is the largest sum of peak resident sizes over a command's process tree; pages that processes share count in each.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "cost.md"
RESULTS = HERE.parent / "results" / "bench.json"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
KBITCHECK = str(Path(sys.executable).with_name("kbitcheck"))
PACKAGES = ("kbitcheck", "torch", "transformers", "bitsandbytes", "peft")

SAMPLE_SECONDS = 0.02
REPEATS = 3
LIGHT_REPEATS = 15  # they take a tenth of a second, so a median of three would be noise


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a command: processor time and memory of its process tree."""

    seconds: float
    mib: float
    code: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A ratio of two commands' medians and the most it should be."""

    what: str
    command: str
    baseline: str
    unit: str
    target: float


IMPL = "`kbitcheck impl reference` (quick suite)"
COMPARISONS = (
    Comparison(f"{IMPL}, processor time", "impl", "lean", "seconds", 4.0),
    Comparison("`kbitcheck --help`, processor time", "help", "python", "seconds", 15.0),
    Comparison("`kbitcheck rules`, processor time", "rules", "python", "seconds", 15.0),
)
BASELINES = {"lean": "the bare script", "python": "`python -c pass`"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# What kbitcheck does for its own worker: without it the bare script pays for a compiler.
LEAN = {**ONE_THREAD, "TORCHDYNAMO_DISABLE": "1"}


def measure(command: Sequence[str], extra: Mapping[str, str], *, sample: bool) -> Measured:
    """Run a command to its end, with the extra environment variables.

    Raises:
        SystemExit: the command failed, so that its time means nothing.
    """
    # A file, not a pipe: nobody reads while the command runs.
    with tempfile.TemporaryFile() as output:
        before = processor_seconds()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1", **extra}
        )
        peak = watched(process) if sample else 0
        code = process.wait()
        seconds = processor_seconds() - before
        if code not in ((0, 1) if command[0] == KBITCHECK else (0,)):  # 1 is a verdict: it ran to its end
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} exited with {code}:\n{output.read().decode(errors='replace')}")
    return Measured(seconds, peak / 2**20, code)


def processor_seconds() -> float:
    """Of all processes that ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watched(process: subprocess.Popen[bytes]) -> int:
    """The largest sum of peak resident bytes over the process tree, until the process ends."""
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, resident(root))
        time.sleep(SAMPLE_SECONDS)
    return peak


def resident(root: psutil.Process) -> int:
    """The most bytes that a process and its living descendants have had resident, each at its own time."""
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            try:
                total += peak_resident(process)
            except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                continue
    except psutil.NoSuchProcess:
        pass
    return total


def peak_resident(process: psutil.Process) -> int:
    """The most bytes that a process has had resident, which no sample misses; where the system keeps no peak, those that it has now."""
    if not sys.platform.startswith("linux"):
        return int(process.memory_info().rss)
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0")  # a zombie has none
    return 1024 * int(peak.split()[1])


def take_turns(commands: Mapping[str, Sequence[str]], repeats: int, *, sample: bool) -> dict[str, list[Measured]]:
    """Each command's runs, one of each command in turn."""
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            runs[name].append(measure(command, LEAN if command[0] != KBITCHECK else ONE_THREAD, sample=sample))
            if sample:
                took = runs[name][-1]
                print(f"{turn + 1}/{repeats} {name}: {took.seconds:.2f} s, {took.mib:.0f} MiB", file=sys.stderr)
    return runs


def medians(runs: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, float]]:
    """Median seconds and, where it was measured, memory of each command."""
    summary: dict[str, dict[str, float]] = {}
    for name, measured in runs.items():
        summary[name] = {"seconds": round(statistics.median(m.seconds for m in measured), 3)}
        if mib := statistics.median(m.mib for m in measured):
            summary[name]["mib"] = round(mib, 1)
    return summary


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run() -> dict[str, Any]:
    """Measure everything."""
    from kbitcheck.models.sources.resolve import resolve

    folder = str(resolve("tiny:llama").checkpoint)
    heavy = {
        "lean": [sys.executable, str(HERE / "bare.py"), folder],
        "impl": [KBITCHECK, "impl", "reference"],
    }
    light = {
        "python": [sys.executable, "-c", "pass"],
        "help": [KBITCHECK, "--help"],
        "rules": [KBITCHECK, "rules"],
    }
    runs = take_turns(heavy, REPEATS, sample=True) | take_turns(light, LIGHT_REPEATS, sample=False)
    summary = medians(runs)
    return {
        "environment": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "medians": summary,
        "exit_codes": {name: sorted({run.code for run in runs[name]}) for name in runs},
        "ratios": [
            {
                "what": c.what,
                "to": BASELINES[c.baseline],
                "ratio": (ratio := round(summary[c.command][c.unit] / summary[c.baseline][c.unit], 2)),
                "target": c.target,
                "met": ratio <= c.target,
            }
            for c in COMPARISONS
        ],
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown, for ``docs/cost.md``."""
    environment = results["environment"]
    lines = ["| command | to | ratio | target | met |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['to']} | {r['ratio']:.2f} | {r['target']:g} | {'yes' if r['met'] else '**no**'} |"
        for r in results["ratios"]
    ]
    machine = ", ".join(f"{name} {environment[name]}" for name in ("python", *PACKAGES[1:]))
    lean = results["medians"]["lean"]
    took = f"The bare script took {lean['seconds']:.1f} s and {lean['mib']:.0f} MiB"
    lines += ["", f"{took} on {environment['cores']} cores ({environment['cpu']}), with {machine}."]
    return "\n".join(lines)


def publish(start: str, text: str, end: str) -> None:
    """Print the text, and put it between two marks of ``docs/cost.md``."""
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(text)


def main() -> None:
    """Measure, and write ``results/bench.json`` and the table of ``docs/cost.md``."""
    results = run()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    publish(START, table(results), END)


if __name__ == "__main__":
    main()
