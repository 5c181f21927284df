"""``--kbit-ledger``: the comparison with a ledger, one cell at a time, as tests are judged one by one."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from kbitcheck.compare import gate
from kbitcheck.compare.gate import Breach
from kbitcheck.compare.ledger import Cell, Ledger
from kbitcheck.core.report import Report
from kbitcheck.core.result import Status
from kbitcheck.models.sources import recipe


@dataclass(frozen=True)
class Accepted:
    """A ledger, compared with results that need not cover all of it."""

    ledger: Ledger

    @cached_property
    def expected(self) -> dict[Cell, Status]:
        """The accepted status by rule and case."""
        return self.ledger.expected

    def reason(self, cell: Cell) -> str:
        """Why a failure or an error is accepted."""
        rule, case = cell
        return next((e.reason for e in self.ledger.accepted if e.rule == rule and case in e.cases), "")

    def breaches(self, report: Report, cell: Cell) -> list[Breach]:
        """How one cell of a report departs from the ledger."""
        rule, case = cell
        listed = cell in self.expected
        return gate.compare(
            replace(report, results=[r for r in report.results if (r.rule, r.case) == cell]),
            replace(
                self.ledger,
                rules=(rule,) if listed else (),
                cases=(case,) if listed else (),
                skipped={case: (rule,)} if rule in self.ledger.skipped.get(case, ()) else {},
                accepted=tuple(
                    replace(e, cases=(case,)) for e in self.ledger.accepted if e.rule == rule and case in e.cases
                ),
            ),
            recipes=recipe.names(),
        )

    def judge_cell(self, report: Report, cell: Cell) -> Report:
        """The report of one cell with its comparison."""
        return gate.settle(report, self.ledger.name, self.breaches(report, cell))

    def judge(self, report: Report, deselected: Iterable[Cell]) -> Report:
        """The report with its comparison; a cell whose test was deselected (``-k``, ``--lf``) is not missed."""
        reported = {(r.rule, r.case) for r in report.results}
        left_out = set(deselected) - reported
        changes = [
            (cell, breach)
            for cell in dict.fromkeys([*self.expected, *reported])
            if cell not in left_out
            for breach in self.breaches(report, cell)
        ]
        breaches = gate.merged((cell, gate.Change(b.kind, b.difference, b.counted)) for cell, b in changes)
        judged = gate.judge(report, self.ledger)
        return replace(judged, gate={**(judged.gate or {}), "breaches": [b.as_json() for b in breaches]})
