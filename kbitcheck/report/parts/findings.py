"""What a report says about a rule: once, however many cases it failed in. Every format shows this structure."""

from collections.abc import Sequence
from dataclasses import dataclass

from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import Rule, rules
from kbitcheck.report.parts.limits import BRIEF, NONE, Limits
from kbitcheck.report.parts.names import grouped
from kbitcheck.report.parts.repro import command

LEVELS = tuple(Level)
CODES = 4  # of rules that could not be judged for the same reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """Failures with the same expected and actual value, their places grouped.

    ``attribution`` says who they are attributed to and what shows it; it is empty where there is no witness.
    """

    places: tuple[str, ...]
    more_places: int
    expected: str
    actual: str
    attribution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way in which a rule failed, or why it could not be judged, and the cases in which it did."""

    cases: tuple[str, ...]
    deviations: tuple[Deviation, ...]
    more_places: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A broken rule with all its variants; or the rules that could not be judged for one reason.

    ``rule`` is None where there are several rules, and for a rule that does not exist any more. ``counted`` says whether
    the finding makes the run non-conforming, ``case_count`` is the number of its cases, ``more_cases`` that of the cases
    whose variants are not shown, and ``again`` the command that repeats it, where there is one.
    """

    codes: tuple[str, ...]
    rule: Rule | None
    level: Level
    error: bool
    counted: bool
    attributed_to: str
    variants: tuple[Variant, ...]
    case_count: int
    more_cases: int
    again: str

    @property
    def grave(self) -> bool:
        """Whether it makes the exit code other than 0."""
        return self.counted or self.error

    @property
    def mark(self) -> str:
        """A cross for what decides the exit code, an exclamation mark for what does not."""
        return "✗" if self.grave else "!"

    @property
    def title(self) -> str:
        """Code and name of the rule, or the codes of the rules that could not be judged."""
        if len(self.codes) > 1:
            more = ", …" if len(self.codes) > CODES else ""
            return f"{len(self.codes)} rules ({', '.join(self.codes[:CODES])}{more})"
        return f"{self.codes[0]} {self.rule.name}" if self.rule else self.codes[0]

    @property
    def advice(self) -> tuple[tuple[str, str], ...]:
        """Symptom and remedy: headings and texts."""
        if self.rule is None or self.error:
            return ()
        advice = (("You will see", self.rule.section("Symptom")), ("Do", self.rule.section("Fix")))
        return tuple((heading, text) for heading, text in advice if text)

    @property
    def requirement(self) -> str:
        """What the rule requires; an empty string where nothing was judged."""
        return self.rule.requirement if self.rule and not self.error else ""


def findings(report: Report, limits: Limits = BRIEF) -> list[Finding]:
    """Failures and errors, worst first: errors, then what counts, then the rest.

    In a gate, what the ledger accepts is left out, unless there are no limits.
    """
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in report.results:
        if result.status not in (Status.FAIL, Status.ERROR):
            continue
        error, counted = result.status is Status.ERROR, report.counts(result)
        if report.gate is None or counted or limits is NONE:
            key = (result.reason,) if error else (result.rule, result.level)
            groups.setdefault((error, counted, *key), []).append(result)
    every = [_finding(report, group, limits) for group in groups.values()]
    return sorted(every, key=lambda f: (not f.error, not f.counted, LEVELS.index(f.level), f.codes))


def _finding(report: Report, group: Sequence[Result], limits: Limits) -> Finding:
    first = group[0]
    codes = tuple(sorted({r.rule for r in group}))
    ways: dict[tuple[object, ...], list[Result]] = {}
    for result in group:
        ways.setdefault((result.failures, result.finding, result.reason), []).append(result)
    variants = [_variant(report, results, limits) for results in ways.values()]
    parties = {failure.party for result in group for failure in result.failures}
    return Finding(
        codes=codes,
        rule=rules().get(codes[0]) if len(codes) == 1 else None,
        level=min((r.level for r in group), key=LEVELS.index),
        error=first.status is Status.ERROR,
        counted=report.counts(first),
        attributed_to=" and ".join(party_name(report, party) for party in Party if party in parties),
        variants=tuple(variants[: limits.variants]),
        case_count=len({r.case for r in group}),
        more_cases=sum(len(v.cases) for v in variants[limits.variants :]),
        again=command(report, first.case, first.rule),
    )


def _variant(report: Report, results: Sequence[Result], limits: Limits) -> Variant:
    first = results[0]
    groups: dict[tuple[Party, str, str, str], list[Observation]] = {}
    for failure in first.failures:
        key = (failure.party, failure.expected, failure.actual, failure.witness)
        groups.setdefault(key, []).append(failure)
    order = tuple(Party)
    deviations = [_deviation(report, groups[key], limits) for key in sorted(groups, key=lambda k: order.index(k[0]))]
    return Variant(
        cases=tuple(dict.fromkeys(r.case for r in results)),
        deviations=tuple(deviations[: limits.deviations]),
        more_places=sum(len(d.places) + d.more_places for d in deviations[limits.deviations :]),
        reason=limits.text(f"a known finding, not counted: {first.finding}" if first.finding else first.reason),
    )


def _deviation(report: Report, failures: Sequence[Observation], limits: Limits) -> Deviation:
    places = grouped(failure.where for failure in failures)
    first = failures[0]
    attribution = f"attributed to {party_name(report, first.party)}: {first.witness}" if first.witness else ""
    return Deviation(
        places=tuple(map(limits.text, places[: limits.places])),
        more_places=max(len(places) - limits.places, 0),
        expected=limits.text(first.expected),
        actual=limits.text(first.actual),
        attribution=limits.text(attribution),
    )


def party_name(report: Report, party: Party) -> str:
    """Who a deviation is attributed to: the implementation by its name, others as ``the stack``."""
    if party is not Party.IMPLEMENTATION:
        return f"the {party.value}"
    return str(report.subject.get("implementation", {}).get("name") or "the implementation")


def evidence(report: Report, result: Result) -> list[str]:
    """What one result saw: a line for each deviation, the implementation's own first, then the reason if there is one."""
    variant = _variant(report, [result], BRIEF)
    lines = [_line(deviation) for deviation in variant.deviations]
    lines += [f"and {variant.more_places} more"] if variant.more_places else []
    return [*lines, *([variant.reason] if variant.reason else [])]


def _line(deviation: Deviation) -> str:
    more = [f"and {deviation.more_places} more"] if deviation.more_places else []
    places = ", ".join([*deviation.places, *more])
    attribution = f" ({deviation.attribution})" if deviation.attribution else ""
    return f"{places}: expected {deviation.expected}; found {deviation.actual}{attribution}"
