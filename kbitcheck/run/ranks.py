"""One report of the processes of a watched run, and what only all of them together show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kbitcheck.core.report import Report
from kbitcheck.run.watch_settings import CASE, Settings

TOGETHER = f"{CASE}, all ranks"
FAMILY = "ranks"  # of the rules that compare processes


class Rank(NamedTuple):
    """The report of one process, and what it holds of what trains (``Replica``), as data."""

    report: Report
    replicas: Sequence[dict[str, Any]]

    @property
    def ranks(self) -> int:
        """The number of processes that train."""
        return int(self.report.subject.get("ranks", 1))


def as_text(report: Report, replicas: Sequence[dict[str, Any]]) -> str:
    """What a process writes of itself; ``read`` reads it back."""
    return json.dumps({"report": report.as_json(), "replicas": list(replicas)})


def read(folder: Path) -> list[Rank]:
    """The processes that have written to a folder."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [Rank(Report.from_json(each["report"]), each["replicas"]) for each in written]


def merged(ranks: Sequence[Rank], settings: Settings) -> Report:
    """One report of all ranks' reports, whose cases are named apart already."""
    reports = [rank.report for rank in ranks]
    first = reports[0]
    cases: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for report in reports:
        cases |= report.subject.get("cases", {})
        facts |= report.facts.get("cases", {})
    results = [result for report in reports for result in report.results]
    if ranks[0].ranks > 1 and results:
        together = list(_compared(ranks, settings))
        codes = {result.rule for result in together}
        results = [result for result in results if result.rule not in codes] + together
    return Report(
        tool=first.tool,
        environment=first.environment,
        subject={**first.subject, "cases": cases},
        results=tuple(results),
        blame=first.blame,
        strict=settings.strict,
        complete=all(report.complete for report in reports),
        facts={"cases": facts, "seconds": max(report.facts.get("seconds", 0.0) for report in reports)},
    )


def _compared(ranks: Sequence[Rank], settings: Settings) -> Iterator[Any]:
    """The results of the rules that compare processes. A script without a quantized model has no use for their imports."""
    from kbitcheck.core.cases import CaseSpec
    from kbitcheck.core.facts import Replica, WatchedRun
    from kbitcheck.core.facts.case import OpenCase
    from kbitcheck.core.rule import judge

    replicas = tuple(Replica.from_json(each) for rank in ranks for each in rank.replicas)
    case = OpenCase(CaseSpec(model=TOGETHER, quant="", implementation="", checkpointing="default"))
    case.case = TOGETHER
    case.watched = WatchedRun(steps=(), adapters=frozenset(), held=frozenset(), replicas=replicas)
    for rule in settings.rules:
        if rule.family == FAMILY:
            yield judge(rule, case)
