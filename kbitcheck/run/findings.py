"""The findings that a run knows: those of no backend, and each backend's own."""

from collections.abc import Iterable

from kbitcheck.backends import registry
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.events import Settle
from kbitcheck.core.finding import Finding
from kbitcheck.judge.conditions import findings as general
from kbitcheck.judge.conditions import settle


def findings() -> tuple[Finding, ...]:
    """Every finding."""
    return (*general(), *(finding for backend in registry.registered() for finding in backend.findings()))


def settler(specs: Iterable[CaseSpec]) -> Settle:
    """A function that excuses the results of these cases by findings, for a ``Collector``."""
    cases = {spec.id: spec for spec in specs}
    every = findings()
    return lambda result, environment: settle(result, cases[result.case], environment, every)
