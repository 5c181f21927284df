"""Reports as ``kbitcheck impl`` writes them, assembled from the outcomes of tests."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.events import Collector, Loaded
from kbitcheck.core.report import Report, assemble
from kbitcheck.core.result import Result
from kbitcheck.pytest_plugin.outcome import Outcome


@dataclass(slots=True)
class Gathered:
    """The outcomes and errors of tests of one implementation. A result that is added again replaces the first."""

    implementation: str
    specs: dict[str, CaseSpec] = field(default_factory=dict)
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    collector: Collector = field(default_factory=Collector)

    def add(self, outcome: Outcome) -> None:
        """Add what a test reported."""
        case = outcome.spec.id
        self.specs[case] = outcome.spec
        self.results.update({(case, result.rule): result for result in outcome.results})
        if outcome.facts:
            self.collector.facts[case] = outcome.facts
        if outcome.loaded.implementation:
            self.collector.loaded = outcome.loaded

    def add_error(self, error: Result, spec: CaseSpec | None) -> None:
        """Add an error for a cell that no test reported."""
        self.results.setdefault((error.case, error.rule), error)
        if spec is not None:
            self.specs[spec.id] = spec

    def report(self, *, strict: bool, complete: bool = True, seconds: float | None = None) -> Report:
        """The report, with results in the order of their cases and rules."""
        self.collector.results = [self.results[key] for key in sorted(self.results)]
        if not self.collector.loaded.implementation:
            self.collector.loaded = Loaded(implementation={"name": self.implementation})
        return assemble(
            self.collector,
            {case: self.specs[case].as_json() for case in sorted(self.specs)},
            subject={"command": "impl", "ignored": {}},
            strict=strict,
            complete=complete,
            seconds=seconds,
        )


def gather(
    outcomes: Iterable[Outcome], errors: Iterable[Result], specs: Mapping[str, CaseSpec], implementation: str
) -> list[Gathered]:
    """Outcomes and errors by implementation.

    An error whose case is not in ``specs`` (``implementation`` on the cases of the options) goes to the first one.
    """
    groups: dict[str, Gathered] = {}

    def group(name: str) -> Gathered:
        return groups.setdefault(name, Gathered(name))

    for outcome in outcomes:
        group(outcome.spec.implementation).add(outcome)
    for error in errors:
        spec = specs.get(error.case)
        group(implementation if spec else next(iter(groups), implementation)).add_error(error, spec)
    return list(groups.values())
