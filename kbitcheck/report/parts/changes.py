"""The changes against a ledger or another report, as a table: what got worse first."""

from collections.abc import Sequence

from kbitcheck.compare.gate import Breach, Kind
from kbitcheck.report.parts.limits import BRIEF, listed
from kbitcheck.report.parts.sortable import Cell, Sortable

WORSE, OTHER, BETTER = "worse", "other", "better"


def changes(breaches: Sequence[Breach]) -> Sortable:
    """The table; changes that count come first, what got better last."""
    ordered = sorted(breaches, key=lambda breach: (not breach.counted, list(Kind).index(breach.kind)))
    return Sortable(
        caption="Changes",
        columns=("rule", "direction", "change", "difference", "cases", "do"),
        rows=[_row(breach) for breach in ordered],
        chosen=("direction", "change"),
        cards=True,
    )


def direction(breach: Breach) -> str:
    """Whether a change is for the worse, which counts, for the better, or neither."""
    return BETTER if breach.kind in (Kind.FIXED, Kind.STALE) else WORSE if breach.counted else OTHER


def _row(breach: Breach) -> list[Cell]:
    way = direction(breach)
    state = {BETTER: "good", WORSE: "bad", OTHER: "warn"}[way]
    return [
        Cell(breach.title),
        Cell(way, state, key=str((WORSE, OTHER, BETTER).index(way) + 1)),
        Cell(breach.kind.value),
        Cell(BRIEF.text(breach.difference)),
        Cell(listed(breach.cases, BRIEF.cases)),
        Cell(breach.todo),
    ]
