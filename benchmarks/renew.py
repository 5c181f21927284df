"""What the Results pages of the docs are made from: the matrix of releases, and sweeps of every architecture.

``python benchmarks/renew.py`` runs the commands again and writes ``results/``; names (``matrix``, ``causal-lm-nf4``) run those alone. Tables
that take hours go on where they were interrupted. ``python benchmarks/renew.py --worse FOLDER`` compares ``results/`` with an older copy of it,
prints each row that got worse as Markdown, and exits with 1 where one did.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.compare.matrix import Mark, Matrix
from kbitcheck.compare.releases import Step
from kbitcheck.compare.sweep import Row, Table
from kbitcheck.models.sources.architecture import CAUSAL_LM
from kbitcheck.report.report_folder import file_name
from kbitcheck.report.tables import sweep
from kbitcheck.report.tables.matrix import render

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGE, SWEEP = ROOT / "docs" / "matrix.md", ROOT / "docs" / "sweep.md"
START, END = "<!-- table:start -->", "<!-- table:end -->"
# Where a machine keeps the checkout, the environments of subjects, and what is temporary.
ELSEWHERE = re.compile(
    rf"{re.escape(str(ROOT))}/|(?:/[\w.-]+)+/environments/[^/\"]+/(?:lib/python[\d.]+/site-packages/)?|/tmp/kbitcheck-\w+/"
)
SWEPT = (
    *(("causal-lm", quant) for quant in ("nf4", "int8", "torchao-int8", "nf4,experts=parametrize")),
    *(
        (task, "nf4")
        for task in ("seq2seq-lm", "image-text-to-text", "speech-seq2seq", "sequence-classification", "masked-lm")
    ),
)
MATRIX = (
    "matrix", "docs/matrix.toml", "--model", "tiny:llama", "--quant", "nf4,storage=bf16", "--quant", "int8",
    "--checkpointing", "default", "--checkpointing", "reentrant", "--reports", "results/reports",
)  # fmt: skip
SWEPT_IN_PAGES = {file_name(f"{task}-{quant}"): task for task, quant in SWEPT if quant == "nf4"}
# A broken rule is a result. What was interrupted, judged in nothing or not asked for rightly is none.
RESULT = (0, 1, 3)
MORE_OFTEN_TRUE = ("loads", "prepares", "trains")


def commands() -> Iterator[tuple[str, tuple[str, ...]]]:
    """By the name of its table: the arguments of each command."""
    yield "matrix", (*MATRIX, "--output", "results/matrix.json")
    for task, quant in SWEPT:
        name = file_name(f"{task}-{quant}")
        options = () if quant == "nf4" else ("--quant", quant)
        yield name, ("sweep", "--task", task, *options, "--jobs", "2", "--output", f"results/sweep/{name}.json")


def lacking() -> dict[str, str]:
    """Why a table cannot be made here, by its name: its quantizer is not installed."""
    reasons = {file_name(f"{task}-{quant}"): Quantization.parse(quant).backend.unavailable() for task, quant in SWEPT}
    return {name: reason for name, reason in reasons.items() if reason}


def renew(name: str, arguments: tuple[str, ...]) -> int:
    """Run a command; its exit code."""
    (RESULTS / "sweep").mkdir(parents=True, exist_ok=True)
    print(f"{name}: kbitcheck {' '.join(arguments)}", flush=True)
    ran = subprocess.run([sys.executable, "-m", "kbitcheck", *arguments, "--format", "json"], cwd=ROOT, check=False)
    for path in RESULTS.rglob("*.json"):
        path.write_text(ELSEWHERE.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")
    if ran.returncode in RESULT:
        (RESULTS / "sweep" / f"{name}.json.jsonl").unlink(
            missing_ok=True
        )  # rows to go on with: the next run starts anew
        publish(name)
    return ran.returncode


def publish(name: str) -> None:
    """Write a table into its page of the docs, for those who read it beside the code; some tables have none."""
    if name == "matrix":
        PAGE.write_text(page(RESULTS / "matrix.json"), encoding="utf-8")
        return
    task = SWEPT_IN_PAGES.get(name)
    if task is not None:
        path = swept_page(task)
        head, rest = path.read_text(encoding="utf-8").split(START, 1)
        path.write_text(f"{head}{START}\n{swept(name)}{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def swept_page(task: str) -> Path:
    """The page of the docs that has the nf4 table of a task."""
    return SWEEP if task == CAUSAL_LM else SWEEP.with_suffix("") / f"{task}.md"


def swept(name: str) -> str:
    """A table of architectures as Markdown."""
    saved = json.loads((RESULTS / "sweep" / f"{name}.json").read_text(encoding="utf-8"))
    return sweep.render(Table.from_json(saved), "markdown")


def page(table: Path) -> str:
    """The matrix as Markdown, for those who read it beside the code."""
    return render(Matrix.from_json(json.loads(table.read_text(encoding="utf-8"))), "markdown")


def worse(before: Path, after: Path) -> Iterator[str]:
    """A line of Markdown for each row of the tables in ``before`` that is worse in ``after``."""
    for path in _tables(before):
        name = path.relative_to(before)
        later = after / name
        if not later.exists():
            yield f"* {name}: the table is gone"
            continue
        compare = _matrix if name.stem == "matrix" else _sweep
        yield from compare(name.stem, _rows(path), _rows(later))


def _tables(folder: Path) -> Iterator[Path]:
    yield from folder.glob("matrix.json")
    yield from sorted((folder / "sweep").glob("*.json"))


def _rows(path: Path) -> dict[str, Mapping[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["subject"]["name"] if "subject" in row else row["architecture"]: row for row in rows}


def _matrix(table: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name, then in before.items():
        now = after.get(name)
        if now is None or (now["error"] and not then["error"]):
            yield f"* {name}: {now['error'] if now else 'the row is gone'}"
            continue
        for code, mark in then["marks"].items():
            evidence = next(iter(now["broken"].get(code, {}).values()), "")
            step = Step(name, name, code, Mark(mark), Mark(now["marks"].get(code, Mark.SKIPPED)), evidence)
            if step.worse or (step.was, step.now) == (Mark.KEPT, Mark.SKIPPED):
                yield f"* {name}: {code} was {step.was}, is {step.now}" + (f" ({evidence})" if evidence else "")


def _sweep(table: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name, then in before.items():
        if name not in after:
            yield f"* {table}, {name}: the row is gone"
            continue
        now = after[name]
        for what in MORE_OFTEN_TRUE:
            if then[what] and not now[what]:
                yield f"* {table}, {name}: no longer {what}" + (f" ({now['reason']})" if now["reason"] else "")
        old, new = Row.from_json(then), Row.from_json(now)
        earlier = {(finding.rule, finding.party) for finding in old.findings}
        for finding in new.findings:
            if (finding.rule, finding.party) not in earlier:
                yield f"* {table}, {name}: {finding.rule} is broken by the {finding.party.value}: {finding.where}: {finding.actual}"
        if new.errors and not old.errors:
            yield f"* {table}, {name}: {' '.join(new.errors)} could not be judged"


def main(arguments: list[str]) -> int:
    """Run what is named, or everything; or compare with an older folder."""
    if arguments[:1] == ["--worse"]:
        before = Path(arguments[1])
        if not list(_tables(before)):
            print(f"{before} holds no table to compare with", file=sys.stderr)
            return 4
        lines = list(worse(before, RESULTS))
        print("\n".join(lines) or "No row got worse.")
        return 1 if lines else 0
    tables = dict(commands())
    if unknown := set(arguments) - set(tables):
        print(f"no such table: {' '.join(sorted(unknown))}; there are {' '.join(tables)}", file=sys.stderr)
        return 4
    for name, reason in ({} if arguments else lacking()).items():
        print(f"{name} stays as it is: {reason}", file=sys.stderr)
        del tables[name]
    codes = {name: renew(name, tables[name]) for name in arguments or tables}
    for name, code in codes.items():
        print(f"{name}: exit code {code}", file=sys.stderr)
    return max((code for code in codes.values() if code not in RESULT), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
