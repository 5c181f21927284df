"""Write the table of compositions.

``python docs/site/composition.py`` runs ``kbitcheck impl peft --suite composition`` on each scheme, with this Python, or takes
JSON reports of such runs as arguments; keeps what they say in ``docs/composition/SCHEME.json``, and makes
``docs/composition.md`` of these files.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kbitcheck.core.report import Report
from kbitcheck.core.result import Result, Status

DATA = Path(__file__).parents[1] / "composition"
PAGE = DATA.with_suffix(".md")
SCHEMES = ("nf4", "int8", "torchao-int8")
COMPOSITIONS = {"ddp": "DDP", "fsdp2": "FSDP2", "trainer": "Trainer", "sft": "SFTTrainer", "compile": "compile"}
MODES = ("reentrant", "non-reentrant", "off")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "trl")
HEAD = """# Several processes, trainers, compilers

What is prepared is seldom trained by a loop in one process. `kbitcheck impl IMPL --suite composition` (a part of `--suite full`) prepares a tiny
Llama with the implementation, puts PEFT's LoRA on it, takes steps of an optimizer in each composition, in processes of their own, and judges
these beside one process alone:

| composition | what runs | rules |
|---|---|---|
| `ddp` | two gloo processes on a CPU, `DistributedDataParallel` as transformers' Trainer makes it | KB701 |
| `fsdp2` | two gloo processes, `fully_shard` on each block and on the rest; integers stay out of the units, as with accelerate | KB741, KB702 |
| `trainer`, `accumulate` | a real `transformers.Trainer`; one that adds up two batches | KB742, KB743 |
| `sft` | TRL's `SFTTrainer`, told to checkpoint as the preparation did; needs `pip install 'kbitcheck[trl]'` | KB742 |
| `compile` | `torch.compile` of the step, on eager kernels (`aot_eager`): what it captures, and no code that it generates | KB704 |
| `copy` | a deep copy and a pickle of the prepared model with adapters | KB705 |
| `resume` | a run with schedule, gradient scaler and data in a drawn order, saved within an accumulation, continued in a fresh process | KB708 |
| `trainer-resume` | a real Trainer, resumed in a fresh process from the checkpoint that it saved | KB708 |

In each, the base's bits are compared (KB744), and how often blocks run and how checkpoints are called (KB745). `--composition NAME` judges
one alone. A gradient may differ by four times as much as one ulp in every module's output moves it; ranks are compared bit by bit, and so is a
resumed run. A failure names the rank where it happens, and what the gradient is instead (*that of the batch of rank 1 alone*). A rank
that dies or hangs ends the others, which are not at fault. What the unprepared base, checkpointed by transformers, does as well is attributed
to the stack. Scripts of your own are judged under `torchrun` by [`kbitcheck watch`](watch.md).

## What works

PEFT's preparation of a tiny Llama, with LoRA on every linear layer. *works* means that no rule of the composition is broken.
A rule in a cell is broken; by whom stands in brackets. That torchao's weights cannot be wrapped is a [finding](findings/torchao_ddp.py).

Measured with {versions} by `python docs/site/composition.py`.
"""


def cell(results: list[Result]) -> str:
    """What a case's results say."""
    if lost := [r.reason for r in results if r.status is Status.ERROR]:
        return f"not judged: {lost[0]}"
    failed = [f"{r.rule} ({r.attributed_to}): {_first(r)}" for r in results if r.status is Status.FAIL and r.failures]
    if failed:
        return "; ".join(failed)
    passed = any(r.status is Status.PASS for r in results)
    return (
        "works"
        if passed
        else f"not judged: {next((r.reason for r in results if 'composition is' not in r.reason), '')}"
    )


def _first(result: Result) -> str:
    seen = result.failures[0]
    more = f" and {len(result.failures) - 1:,} more" if len(result.failures) > 1 else ""
    actual = seen.actual.partition(", types=")[0]
    return f"{seen.where.replace('base_model.model.', '')}: {actual}{more}"


def keep(report: Report) -> None:
    """Keep the cells of a report."""
    versions = {name: number for name in PACKAGES if (number := _version(name))}
    for case, spec in report.subject["cases"].items():
        if spec["composition"] not in COMPOSITIONS:
            continue
        file = DATA / f"{spec['quant']}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": {}}
        of_case = cell([result for result in report if result.case == case])
        kept["cells"].setdefault(spec["composition"], {})[spec["checkpointing"]] = of_case
        file.write_text(json.dumps({"versions": versions, "cells": kept["cells"]}, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def measured() -> Iterable[Path]:
    """The report of a run on each scheme."""
    named = [word for name in COMPOSITIONS for word in ("--composition", name)]
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "report.json")
            command = [
                sys.executable,
                "-m",
                "kbitcheck",
                "impl",
                "peft",
                "--suite",
                "composition",
                "--quant",
                scheme,
                *named,
            ]
            subprocess.run([*command, "--format", "json", "--output", str(file)], check=False)
            yield file


def page() -> str:
    """The page, of the data that is there."""
    seen = {
        s: json.loads((DATA / f"{s}.json").read_text(encoding="utf-8"))
        for s in SCHEMES
        if (DATA / f"{s}.json").exists()
    }
    versions = ", ".join(dict.fromkeys(f"{n} {v}" for each in seen.values() for n, v in each["versions"].items()))
    lines = [
        HEAD.format(versions=versions),
        f"| | checkpointing | {' | '.join(seen)} |",
        "|---" * (len(seen) + 2) + "|",
    ]
    for name, title in COMPOSITIONS.items():
        for mode in MODES:
            cells = [each["cells"].get(name, {}).get(mode, "not tried").replace("|", "/") for each in seen.values()]
            lines.append(f"| {title} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(reports: list[str]) -> None:
    DATA.mkdir(exist_ok=True)
    for file in map(Path, reports) if reports else measured():
        keep(Report.from_json(json.loads(file.read_text(encoding="utf-8"))))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
