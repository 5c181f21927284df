"""What a report has to say, worst first, each thing once however many cases it was seen in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.report.parts.names import grouped

LEVELS = tuple(Level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The same failure, or the same error, of these rules in these cases."""

    rules: tuple[str, ...]
    cases: tuple[str, ...]
    level: Level
    counted: bool
    reason: str
    failures: tuple[Observation, ...]

    @property
    def error(self) -> bool:
        """Whether nothing was judged."""
        return not self.failures


@dataclass(frozen=True, slots=True)
class Deviation:
    """Failures that expected and got the same, with their places grouped."""

    where: tuple[str, ...]
    expected: str
    actual: str
    party: Party
    witness: str


def findings(report: Report) -> list[Finding]:
    """Failures and errors, worst first: what could not be judged (and why), then what counts, then what is told."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in report.results:
        if result.status is Status.FAIL:
            key: tuple[object, ...] = (result.rule, result.level, result.failures, _reason(result))
        elif result.status is Status.ERROR:
            key = (None, result.reason)
        else:
            continue
        groups.setdefault(key, []).append(result)
    found = [
        Finding(
            rules=tuple(sorted({r.rule for r in group})),
            cases=tuple(dict.fromkeys(r.case for r in group)),
            level=min((r.level for r in group), key=LEVELS.index),
            counted=report.counts(group[0]),
            reason=_reason(group[0]),
            failures=group[0].failures,
        )
        for group in groups.values()
    ]
    return sorted(found, key=lambda f: (not f.error, not f.counted, LEVELS.index(f.level), f.rules))


def by_rule(found: Sequence[Finding]) -> list[list[Finding]]:
    """Neighbours that are of one rule and weigh the same, together; what could not be judged stays by itself."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for number, finding in enumerate(found):
        key = (number,) if finding.error else (finding.rules, finding.counted, finding.level)
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _reason(result: Result) -> str:
    return f"a known finding: {result.finding}" if result.finding else result.reason


def deviations(failures: Sequence[Observation]) -> list[Deviation]:
    """Failures by what was expected and found; the implementation's own first."""
    groups: dict[tuple[str, str, Party, str], list[str]] = {}
    for seen in failures:
        groups.setdefault((seen.expected, seen.actual, seen.party, seen.witness), []).append(seen.where)
    found = [Deviation(tuple(grouped(where)), *key) for key, where in groups.items()]
    order = tuple(Party)
    return sorted(found, key=lambda d: order.index(d.party))
