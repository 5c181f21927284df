"""Counts the forwards, backwards, copies and calls of every fact on tiny:llama; run it by ``make bench``.

Writes ``results/passes.json``, which a test holds against what the facts declare, and the table of ``docs/cost.md``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import Passes
from kbitcheck.core.rule import judge, rules
from kbitcheck.observe.open_case import open_case
from kbitcheck.observe.passes import OPENING, counted
from kbitcheck.run.subject import load

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "cost.md"
START, END = "<!-- passes:start -->", "<!-- passes:end -->"
SPEC = CaseSpec(
    model="tiny:llama",
    quant="nf4",
    implementation="reference",
    checkpointing="reentrant",
    conditions="the norms thawed",
)


def count() -> dict[str, Passes]:
    """The passes of each fact while all rules judge one case."""
    with torch.compiler.set_stance("force_eager"), counted() as counts:
        reference = load(SPEC.implementation)
        case = open_case(SPEC, dataclasses.replace(reference, function=counts.calls(reference.function)))
        for rule in rules().values():
            judge(rule, case)
        case.close()
    return {name: passes for name, passes in counts.by_fact.items() if name != OPENING}


def table(counts: Mapping[str, Passes]) -> str:
    """The totals and the dearest facts as Markdown."""
    names = [field.name for field in dataclasses.fields(Passes)]
    rows = sorted(counts.items(), key=lambda row: -sum(dataclasses.astuple(row[1])))
    whole = sum(counts.values(), Passes())
    lines = [f"| fact | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for name, passes in [("all facts", whole), *((name.lstrip("_"), passes) for name, passes in rows[:8])]:
        lines.append(f"| {name} | {' | '.join(str(n) if n else '' for n in dataclasses.astuple(passes))} |")
    return "\n".join(lines)


def main() -> None:
    """Count, and write."""
    counts = count()
    data = {name: dataclasses.asdict(passes) for name, passes in sorted(counts.items())}
    (HERE.parent / "results" / "passes.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n{table(counts)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table(counts))


if __name__ == "__main__":
    main()
