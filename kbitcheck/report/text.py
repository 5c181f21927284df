"""The report for people. The first screen answers: may I go on, what is wrong, who causes it, what do I do?"""

import re
import textwrap
from collections.abc import Iterable, Iterator

from kbitcheck.compare.gate import breaches
from kbitcheck.core.facts.case import WHOLE
from kbitcheck.core.report import Report
from kbitcheck.core.result import Status
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.broken_rules import BrokenRule, Deviation, Variant, broken_rules
from kbitcheck.report.parts.conditions import drawn
from kbitcheck.report.parts.cuts import cuts
from kbitcheck.report.parts.header import header
from kbitcheck.report.parts.limits import BRIEF, NONE, listed
from kbitcheck.report.parts.markup import printable
from kbitcheck.report.parts.notes import notes as remarks
from kbitcheck.report.parts.table import rows
from kbitcheck.report.parts.verdict import verdict

Line = tuple[str, str]  # text and rich style

INDENT = "    "


def render(report: Report, *, width: int, verbose: bool = False) -> str:
    """The whole report; lines are wrapped at ``width`` columns, names and commands never inside."""
    return "".join(f"{text}\n" for text, _ in lines(report, width=width, verbose=verbose))


def lines(report: Report, *, width: int, verbose: bool = False) -> list[Line]:
    """The whole report, line by line."""
    return [(printable(text), style) for text, style in _Page(report, width, verbose=verbose).lines()]


def failures(report: Report, *, width: int) -> str:
    """The broken rules without the report's head and foot, as the message of a failing test."""
    page = _Page(report, width, verbose=False)
    return "\n\n".join("\n".join(printable(text) for text, _ in page.broken(rule)) for rule in broken_rules(report))


class _Page:
    def __init__(self, report: Report, width: int, *, verbose: bool) -> None:
        self._report = report
        self._width = width
        self._limits = NONE if verbose else BRIEF
        self._cases = tuple(report.subject.get("cases") or dict.fromkeys(r.case for r in report.results))

    def lines(self) -> Iterator[Line]:
        yield from self._wrapped(header(self._report), "bold")
        yield "", ""
        style = "bold green" if self._report.exit_code == 0 else "bold red"
        seconds = self._report.facts.get("seconds")
        yield from self._ends(verdict(self._report), "" if seconds is None else f"{seconds:.1f} s", style)
        yield from self._changes()
        for rule in broken_rules(self._report, self._limits):
            yield "", ""
            yield from self.broken(rule)
        if self._limits is NONE:
            yield from self._passed_and_skipped()
        yield from self._foot()

    def _changes(self) -> Iterator[Line]:
        """The changes that the gate reports, a line each."""
        if self._report.gate is None:
            return
        yield "", ""
        for breach in breaches(self._report):
            yield f"{'✗' if breach.counted else '!'} {breach.line}", "bold red" if breach.counted else "yellow"
        for note in self._report.gate["notes"]:
            yield f"  {note}", "dim"

    def broken(self, rule: BrokenRule) -> Iterator[Line]:
        """One broken rule, or the rules that could not be judged for one reason."""
        style = "bold red" if rule.grave else "bold yellow"
        if rule.error:
            yield from self._ends(f"{rule.mark} {rule.title} could not be judged", "ERROR", style)
        else:
            title = f"{rule.mark} {rule.title}  ({rule.level.value}{f', on a cut: {rule.cut}' if rule.cut else ''})"
            yield from self._ends(title, f"attributed to {rule.attributed_to}", style)
        yield from self._wrapped(rule.requirement, "", INDENT)
        for variant in rule.variants:
            yield from self._variant(variant)
        if rest := rule.more_cases:
            yield f"{INDENT}… and otherwise in {rest} more {'case' if rest == 1 else 'cases'} (-v lists them)", "dim"
        for heading, text in rule.advice:
            yield from self._wrapped(f"{heading}: {text}", "", INDENT)
        if rule.again:
            yield f"{INDENT}Again: {rule.again}", "cyan"

    def _variant(self, variant: Variant) -> Iterator[Line]:
        if len(self._cases) > 1:
            every = set(variant.cases) == set(self._cases)
            cases = f"all {len(self._cases)} cases" if every else listed(variant.cases, self._limits.cases)
            yield from self._wrapped(f"In {cases}:", "dim", INDENT)
        for deviation in variant.deviations:
            yield from self._deviation(deviation)
        if variant.more_places:
            yield f"{INDENT}… and {variant.more_places} more (-v lists them)", "dim"
        yield from self._wrapped(variant.reason, "", INDENT)

    def _deviation(self, deviation: Deviation) -> Iterator[Line]:
        rest = f", and {deviation.more_places} more (-v lists them)" if deviation.more_places else ""
        yield from self._wrapped(", ".join(deviation.places) + rest, "bold", INDENT + "- ", hanging=INDENT + "  ")
        yield from self._wrapped(f"expected {deviation.expected}; found {deviation.actual}", "", INDENT + "  ")
        yield from self._wrapped(deviation.attribution, "dim", INDENT + "  ")

    def _passed_and_skipped(self) -> Iterator[Line]:
        for status, word in ((Status.PASS, "kept"), (Status.SKIP, "not applicable")):
            results = [r for r in self._report.results if r.status is status]
            if results:
                yield "", ""
                yield word, "bold"
            for result in results:
                place = f" [{result.case}]" if len(self._cases) > 1 else ""
                text = f"{rules().title(result.rule)}{place}: {result.reason or f'{result.examined} examined'}"
                text += f" (on a cut: {result.cut})" if result.cut not in ("", WHOLE) else ""
                yield from self._wrapped(text, "dim", "  ")

    def _foot(self) -> Iterator[Line]:
        notes = [("ignored", "", f"{c}: {why}") for c, why in self._report.subject.get("ignored", {}).items()]
        notes += [("cut", "", line) for line in cuts(self._report)]
        notes += [("note", "", note) for note in remarks(self._report)]
        if self._report.subject.get("command") in ("impl", "gate"):
            notes += [("" if number else "drawn", "", line) for number, line in enumerate(drawn(self._report))]
        notes += rows(self._report)
        if notes or not self._report.complete:
            yield "", ""
        # Cases stand in a column of their own, unless it would be wide.
        wide = max((len(cases) for _, cases, _ in notes), default=0)
        column = wide + 2 if 0 < wide < self._width // 4 else 0
        for heading, cases, text in notes:
            indent = f"{heading:11} {cases:{column}}" if cases and column else f"{heading:11} "
            text = f"{cases}: {text}" if cases and not column else text
            yield from self._wrapped(text, "", indent, hanging=" " * len(indent))
        if not self._report.complete:
            yield from self._wrapped("This report is not complete: the run was interrupted.", "")

    def _ends(self, left: str, right: str, style: str) -> Iterator[Line]:
        """``left`` at the margin and ``right`` at the end of the line, on two lines where one is too short."""
        gap = self._width - len(left) - len(right)
        if right and gap > 1:
            yield f"{left}{' ' * gap}{right}", style
        else:
            yield from self._wrapped(left, style, hanging="  ")
            yield from self._wrapped(right, style, " " * max(self._width - len(right), 2))

    def _wrapped(self, text: str, style: str, indent: str = "", hanging: str | None = None) -> Iterable[Line]:
        folded = textwrap.wrap(
            re.sub(r"(\d) ([kMGT]i?B|B)\b", "\\1\N{NO-BREAK SPACE}\\2", text),
            self._width,
            initial_indent=indent,
            subsequent_indent=indent if hanging is None else hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return [(line.replace("\N{NO-BREAK SPACE}", " "), style) for line in folded]
