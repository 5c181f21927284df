"""Reports as ``kbitcheck impl`` writes them, assembled from the outcomes of tests."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kbitcheck.compare import gate
from kbitcheck.compare.ledger import Cell
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.events import Collector, Loaded
from kbitcheck.core.report import Report, assemble
from kbitcheck.core.result import Result
from kbitcheck.models.sources import recipe
from kbitcheck.pytest_plugin.options import Settings
from kbitcheck.pytest_plugin.outcome import Outcome
from kbitcheck.run.configuration import subject_of


def reports(
    outcomes: Iterable[Outcome],
    errors: Iterable[Result],
    specs: Mapping[str, CaseSpec],
    implementation: str,
    settings: Settings,
    **options: Any,
) -> list[Report]:
    """One report for each implementation, with ``options`` of ``assemble``.

    ``errors`` are of cells that no test judged. One whose case is not in ``specs`` (``implementation`` on the cases of
    the options) goes to the first implementation.
    """
    judged: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        judged.setdefault(outcome.spec.implementation, []).append(outcome)
    first = next(iter(judged), implementation)
    missing: dict[str, list[Result]] = {}
    for error in errors:
        missing.setdefault(implementation if error.case in specs else first, []).append(error)
    subject = {"command": "impl", "ignored": settings.ignored, **subject_of(settings.configuration)}
    options |= {"subject": subject, "strict": settings.strict}
    return [
        _report(name, judged.get(name, []), missing.get(name, []), specs, options) for name in {**judged, **missing}
    ]


def compared(report: Report, settings: Settings, *, left_out: Iterable[Cell] = (), cell: Cell | None = None) -> Report:
    """The report of ``--kbit-impl`` with its comparison, where there is a ledger; any other report itself.

    No cell of ``left_out``, whose tests were deselected (``-k``, ``--lf``), is missed. With ``cell`` the ledger is cut
    down to that cell, as tests are judged one by one: the whole of it for each test takes minutes.
    """
    implementations = {spec["implementation"] for spec in report.subject.get("cases", {}).values()}
    if settings.ledger is None or implementations != {settings.implementation}:
        return report
    ledger = settings.ledger if cell is None else settings.ledger.part(cell)
    return gate.judge(report, ledger, recipes=recipe.names(), left_out=left_out, selection=_selection(settings))


def _selection(settings: Settings) -> gate.Selection:
    """The cells of ``--kbit-impl``. Where no option narrows them, what is missing is lost: its test may be gone."""
    return gate.Selection(
        rules={rule.code for rule in settings.rules},
        cases={spec.id for spec in settings.specs},
        rules_by=settings.origins("select"),
        cases_by=settings.origins("models", "quants", "checkpointing"),
    )


def _report(
    implementation: str,
    outcomes: Sequence[Outcome],
    errors: Sequence[Result],
    specs: Mapping[str, CaseSpec],
    options: Mapping[str, Any],
) -> Report:
    """Results are in the order of cases and rules; of several for one cell the last counts, an error only alone."""
    results = {(r.case, r.rule): r for r in [*errors, *(r for outcome in outcomes for r in outcome.results)]}
    cases = {e.case: specs[e.case] for e in errors if e.case in specs} | {o.spec.id: o.spec for o in outcomes}
    loaded = [outcome.loaded for outcome in outcomes if outcome.loaded.implementation]
    collector = Collector(loaded=loaded[-1] if loaded else Loaded(implementation={"name": implementation}))
    collector.results = [results[cell] for cell in sorted(results)]
    collector.facts = {outcome.spec.id: outcome.facts for outcome in outcomes if outcome.facts}
    return assemble(collector, {case: cases[case].as_json() for case in sorted(cases)}, **options)
