"""What a report says about a broken rule: once, however many cases it failed in. Every format shows this structure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kbitcheck.core.causes import causes
from kbitcheck.core.facts.case import WHOLE
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import Rule, rules
from kbitcheck.report.parts.limits import BRIEF, NONE, Limits
from kbitcheck.report.parts.names import grouped
from kbitcheck.report.parts.repro import command

LEVELS, PARTIES = tuple(Level), tuple(Party)
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
class BrokenRule:
    """A broken rule with all its variants; or the rules that could not be judged for one reason.

    ``rule`` is None for what could not be judged, and for a rule that does not exist any more. ``counted`` says whether
    it makes the run non-conforming, ``case_count`` is the number of its cases, ``more_cases`` that of the cases whose
    variants are not shown, and ``again`` the command that repeats it, where there is one. ``cut`` is the part of the model
    that the rule looked at, ``2 of 30 blocks``, where it looked at a cut. ``cause`` is the broken rule that explains this one, if one does.
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
    cut: str = ""
    cause: str = ""

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
        if len(self.codes) == 1:
            return rules().title(self.codes[0])
        more = ", …" if len(self.codes) > CODES else ""
        return f"{len(self.codes)} rules ({', '.join(self.codes[:CODES])}{more})"

    @property
    def requirement(self) -> str:
        """What the rule requires; an empty string where nothing was judged."""
        return self.rule.requirement if self.rule else ""

    @property
    def advice(self) -> tuple[tuple[str, str], ...]:
        """Symptom and remedy: headings and texts; of a rule that another one explains, that one."""
        if self.rule is None:
            return ()
        if self.cause:
            return (("Do", f"mend {self.cause} first: what breaks it breaks this rule, too"),)
        advice = (("You will see", self.rule.section("Symptom")), ("Do", self.rule.section("Fix")))
        return tuple((heading, text) for heading, text in advice if text)


def broken_rules(report: Report, limits: Limits = BRIEF) -> list[BrokenRule]:
    """Failures and errors, worst first: what counts, then errors, then the rest; of one level, causes before what follows from them.

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
    explained = causes(report.results)
    every = [_broken_rule(report, group, limits, explained) for group in groups.values()]
    ranked = sorted(every, key=lambda b: (not b.counted, LEVELS.index(b.level), bool(b.cause), b.codes))
    return sorted(ranked, key=lambda b: (b.error or not b.counted, not b.error))


def _broken_rule(report: Report, group: Sequence[Result], limits: Limits, explained: Mapping[str, str]) -> BrokenRule:
    first = group[0]
    error = first.status is Status.ERROR
    ways: dict[tuple[object, ...], list[Result]] = {}
    for result in group:
        ways.setdefault((result.failures, result.finding, result.reason), []).append(result)
    variants = [_variant(report, results, limits) for results in ways.values()]
    parties = {failure.party for result in group for failure in result.failures}
    return BrokenRule(
        codes=tuple(sorted({r.rule for r in group})),
        rule=None if error else rules().get(first.rule),
        level=min((r.level for r in group), key=LEVELS.index),
        error=error,
        counted=report.counts(first),
        attributed_to=" and ".join(_party(report, party) for party in PARTIES if party in parties),
        variants=tuple(variants[: limits.variants]),
        case_count=len({r.case for r in group}),
        more_cases=sum(len(v.cases) for v in variants[limits.variants :]),
        again=command(report, first.case, first.rule),
        cause="" if error else explained.get(first.rule, ""),
        cut=" and ".join(dict.fromkeys(r.cut for r in group if r.cut not in ("", WHOLE))),
    )


def _variant(report: Report, results: Sequence[Result], limits: Limits) -> Variant:
    first = results[0]
    groups: dict[tuple[str, ...], list[Observation]] = {}
    for failure in sorted(first.failures, key=lambda f: PARTIES.index(f.party)):
        key = (failure.party, failure.expected, failure.actual, failure.witness)
        groups.setdefault(key, []).append(failure)
    deviations = [_deviation(report, failures, limits) for failures in groups.values()]
    return Variant(
        cases=tuple(dict.fromkeys(r.case for r in results)),
        deviations=tuple(deviations[: limits.deviations]),
        more_places=sum(len(d.places) + d.more_places for d in deviations[limits.deviations :]),
        reason=limits.text(f"a known finding, not counted: {first.finding}" if first.finding else first.reason),
    )


def _deviation(report: Report, failures: Sequence[Observation], limits: Limits) -> Deviation:
    places = grouped(failure.where for failure in failures)
    first = failures[0]
    attribution = f"attributed to {_party(report, first.party)}: {first.witness}" if first.witness else ""
    return Deviation(
        places=tuple(map(limits.text, places[: limits.places])),
        more_places=max(len(places) - limits.places, 0),
        expected=limits.text(first.expected),
        actual=limits.text(first.actual),
        attribution=limits.text(attribution),
    )


def _party(report: Report, party: Party) -> str:
    """The implementation by its name, others as ``the stack``."""
    name = report.subject.get("implementation", {}).get("name") if party is Party.IMPLEMENTATION else ""
    return str(name or f"the {party.value}")


def evidence(report: Report, result: Result) -> list[str]:
    """What one result saw: a line for each deviation, the implementation's own first, then the reason if there is one."""
    variant = _variant(report, [result], BRIEF)
    more = f"and {variant.more_places} more" if variant.more_places else ""
    return list(filter(None, [*map(_line, variant.deviations), more, variant.reason]))


def _line(deviation: Deviation) -> str:
    places = ", ".join(deviation.places) + (f", and {deviation.more_places} more" if deviation.more_places else "")
    attribution = f" ({deviation.attribution})" if deviation.attribution else ""
    return f"{places}: expected {deviation.expected}; found {deviation.actual}{attribution}"
