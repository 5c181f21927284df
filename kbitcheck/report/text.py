"""The report for people. The first screen answers: may I go on, what is wrong, who causes it, what do I do?"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kbitcheck.compare.gate import Breach
from kbitcheck.core.report import Report
from kbitcheck.core.result import Status
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.findings import Deviation, Finding, Variant, findings
from kbitcheck.report.parts.limits import BRIEF, NONE, listed
from kbitcheck.report.parts.markup import printable
from kbitcheck.report.parts.memory import rows, scaled
from kbitcheck.report.parts.verdict import verdict

if TYPE_CHECKING:
    from rich.console import Console

Line = tuple[str, str]  # text and rich style

INDENT = "    "


def render(report: Report, *, width: int, verbose: bool = False) -> str:
    """The whole report; lines are wrapped at ``width`` columns, names and commands never inside."""
    return "".join(f"{text}\n" for text, _ in lines(report, width=width, verbose=verbose))


def show(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Print the whole report on a console, in colours."""
    from rich.text import Text

    for text, style in lines(report, width=console.width, verbose=verbose):
        console.print(Text(text, style=style), soft_wrap=True)


def lines(report: Report, *, width: int, verbose: bool = False) -> list[Line]:
    """The whole report, line by line."""
    return [(printable(text), style) for text, style in _Page(report, width, verbose=verbose).lines()]


def findings_only(report: Report, *, width: int) -> str:
    """The report's findings without its head and foot, as the message of a failing test."""
    page = _Page(report, width, verbose=False)
    return "\n\n".join("\n".join(printable(text) for text, _ in page.finding(f)) for f in findings(report))


class _Page:
    def __init__(self, report: Report, width: int, *, verbose: bool) -> None:
        self._report = report
        self._width = width
        self._limits = NONE if verbose else BRIEF
        self._cases = tuple(report.subject.get("cases") or dict.fromkeys(r.case for r in report.results))

    def lines(self) -> Iterator[Line]:
        yield from self._wrapped(self._header(), "bold")
        yield "", ""
        style = "bold green" if self._report.exit_code == 0 else "bold red"
        seconds = self._report.facts.get("seconds")
        yield from self._ends(verdict(self._report), "" if seconds is None else f"{seconds:.1f} s", style)
        yield from self._changes()
        for finding in findings(self._report, self._limits):
            yield "", ""
            yield from self.finding(finding)
        if self._limits is NONE:
            yield from self._passed_and_skipped()
        yield from self._foot()

    def _header(self) -> str:
        subject, environment = self._report.subject, self._report.environment
        implementation = subject.get("implementation", {})
        name, version = implementation.get("name", "?"), implementation.get("version", "")
        by = name if version in name else f"{name} {version}"  # a requirement names its own version
        specs = [subject["cases"][case] for case in self._cases] if "cases" in subject else []
        facts = self._report.facts.get("cases", {})
        models = dict.fromkeys(
            _model(s["model"], facts.get(case, {})) for case, s in zip(self._cases, specs, strict=False)
        )
        where = " ".join(filter(None, [environment.get("device", ""), environment.get("device_name", "")]))
        static = next((f["static"] for f in facts.values() if "static" in f), "")
        recipes = dict.fromkeys(f["recipe"] for f in facts.values() if "recipe" in f)
        parts = [
            self._report.tool,
            next(iter(models)) if len(models) == 1 else f"{len(models)} models",
            " and ".join(dict.fromkeys(s["quant"] for s in specs)) if len(specs) < 4 else f"{len(specs)} cases",
            *([f"static audit: {static}"] if static else [f"prepared by {by}", where]),
            " and ".join(recipes),
            "in this process" if subject.get("in_process") else "",
        ]
        return " · ".join(filter(None, parts))

    def _changes(self) -> Iterator[Line]:
        """The changes that the gate reports, a line each."""
        if self._report.gate is None:
            return
        yield "", ""
        for breach in map(Breach.from_json, self._report.gate["breaches"]):
            yield f"{'✗' if breach.counted else '!'} {breach.line}", "bold red" if breach.counted else "yellow"
        for note in self._report.gate["notes"]:
            yield f"  {note}", "dim"

    def finding(self, finding: Finding) -> Iterator[Line]:
        """One broken rule, or the rules that could not be judged for one reason."""
        style = "bold red" if finding.grave else "bold yellow"
        if finding.error:
            yield from self._ends(f"{finding.mark} {finding.title} could not be judged", "ERROR", style)
        else:
            title = f"{finding.mark} {finding.title}  ({finding.level.value})"
            yield from self._ends(title, f"attributed to {finding.attributed_to}", style)
        yield from self._wrapped(finding.requirement, "", INDENT)
        for variant in finding.variants:
            yield from self._variant(variant)
        if rest := finding.more_cases:
            yield f"{INDENT}… and otherwise in {rest} more {'case' if rest == 1 else 'cases'} (-v lists them)", "dim"
        for heading, text in finding.advice:
            yield from self._wrapped(f"{heading}: {text}", "", INDENT)
        if finding.again:
            yield f"{INDENT}Again: {finding.again}", "cyan"

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
        several, registered = len(self._cases) > 1, rules()
        for status, word in ((Status.PASS, "kept"), (Status.SKIP, "not applicable")):
            results = [r for r in self._report.results if r.status is status]
            if results:
                yield "", ""
                yield word, "bold"
            for result in results:
                name = registered[result.rule].name if result.rule in registered else ""
                tail = result.reason or f"{result.examined} examined"
                place = f" [{result.case}]" if several else ""
                yield from self._wrapped(f"{result.rule} {name}{place}: {tail}", "dim", "  ")

    def _foot(self) -> Iterator[Line]:
        notes = [("ignored", "", f"{c}: {why}") for c, why in self._report.subject.get("ignored", {}).items()]
        if self._report.subject.get("command") in ("model", "audit"):
            notes += rows(self._report.facts.get("cases", {}), self._report.subject.get("cases", {}))
        wide = max((len(of) for _, of, _ in notes), default=0)
        beside = f"{{:{wide}}}  " if 0 < wide < self._width // 4 else "{}: "
        if notes or not self._report.complete:
            yield "", ""
        for heading, of, text in notes:
            indent = f"{heading:9}" + (beside.format(of) if of else "")
            if of and beside == "{}: ":
                yield from self._wrapped(indent + text, "", hanging=" " * 9)
            else:
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


def _model(model: str, facts: Mapping[str, Any]) -> str:
    """The model's name with its class and size, as far as the facts say them."""
    size = facts.get("parameters")
    number = scaled(size, ("", "K", "M", "B", "T")).rstrip() if size else ""
    about = ", ".join(filter(None, [facts.get("model_class", ""), number]))
    return f"{model} ({about})" if about else model
