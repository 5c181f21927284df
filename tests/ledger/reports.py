"""Hand-made reports for the tests of gate, ledger, diff and reporters."""

from __future__ import annotations

from typing import Any

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status

CODES = ("KB101", "KB201", "KB505")
OWN = Observation("model.norm", "float32", "float16", ok=False)
STACK = Observation("model.norm", "float32", "float16", ok=False, party=Party.STACK, witness="a bare layer")
SPECS = tuple(
    CaseSpec(model="tiny:llama", quant=quant, implementation="fork:prepare", checkpointing="off", device="auto")
    for quant in ("int8", "nf4")
)
INT8, NF4 = (spec.id for spec in SPECS)
ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "device": "cpu"}


def result(rule: str, case: str, status: Status = Status.PASS, *failures: Observation, **changes: Any) -> Result:
    if status is Status.FAIL and not failures:
        failures = (OWN,)
    if status in (Status.SKIP, Status.ERROR):
        changes.setdefault("reason", "there is nothing" if status is Status.SKIP else "it broke")
    party = failures[0].party if failures else None
    fields: dict[str, Any] = {
        "rule": rule,
        "case": case,
        "level": Level.MUST,
        "status": status,
        "attributed_to": party,
    } | {"examined": 3, "failures": failures, **changes}
    return Result(**fields)


def report(*other: Result, drop: tuple[tuple[str, str], ...] = (), **changes: Any) -> Report:
    """Every code on both cases passes, but for the results given and the cells dropped."""
    cells = {(c, s.id): result(c, s.id) for s in SPECS for c in CODES} | {(r.rule, r.case): r for r in other}
    subject = {
        "command": "gate",
        "implementation": {"name": "fork:prepare", "version": "1"},
        "cases": {s.id: s.as_json() for s in SPECS},
        **changes.pop("subject", {}),
    }
    kept = tuple(r for cell, r in cells.items() if cell not in drop)
    return Report(
        **{"tool": "kbitcheck 0", "environment": ENVIRONMENT, "subject": subject, "results": kept, "blame": "own"}
        | changes
    )
