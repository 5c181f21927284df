"""The report for people. The first screen answers: may I go on, what is wrong, whose fault is it, what do I do?"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kbitcheck.compare.gate import Breach
from kbitcheck.core.report import Report
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import Rule, rules
from kbitcheck.report.parts.counts import Tally
from kbitcheck.report.parts.findings import Deviation, Finding, by_rule, deviations, findings
from kbitcheck.report.parts.memory import rows, scaled
from kbitcheck.report.parts.repro import command

Line = tuple[str, str]  # text and rich style

SHOWN = 3  # deviations of one finding, unless verbose
PLACES = 8  # grouped names of one deviation, unless verbose
SIGNATURES = 3  # ways in which one rule failed, unless verbose
CASES = 4  # in which it failed so, unless verbose
INDENT = "    "


def render(report: Report, *, width: int, color: bool = False, verbose: bool = False) -> str:
    """The whole report; lines are wrapped at ``width`` columns, names and commands never inside."""
    plain = _printable(_Page(report, width, verbose).lines())
    if not color:
        return "".join(f"{text}\n" for text, _ in plain)
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, highlight=False, legacy_windows=False)
    for text, style in plain:
        console.print(Text(text, style=style), soft_wrap=True)
    return out.getvalue()


def findings_only(report: Report, *, width: int) -> str:
    """The report's findings without its head and foot, as the message of a failing test."""
    page = _Page(report, width, verbose=False)
    return "\n\n".join("\n".join(text for text, _ in _printable(page.finding(v))) for v in by_rule(findings(report)))


def _printable(lines: Iterable[Line]) -> list[Line]:
    return [
        ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style) for text, style in lines
    ]


class _Page:
    def __init__(self, report: Report, width: int, verbose: bool) -> None:
        self._report = report
        self._width = width
        self._verbose = verbose
        self._known = rules()
        self._cases = tuple(report.subject.get("cases") or dict.fromkeys(r.case for r in report.results))

    def lines(self) -> Iterator[Line]:
        yield from self._wrapped(self._header(), "bold")
        yield "", ""
        style = "bold green" if self._report.exit_code == 0 else "bold red"
        yield self._ends(Tally(self._report).line(), _seconds(self._report.facts.get("seconds"))), style
        yield from self._changes()
        for variants in by_rule(findings(self._report)):
            if self._report.gate is not None and not variants[0].counted and not self._verbose:
                continue  # accepted
            yield "", ""
            yield from self.finding(variants)
        if self._verbose:
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
            _named(s["model"], facts.get(case, {})) for case, s in zip(self._cases, specs, strict=False)
        )
        where = " ".join(filter(None, [environment.get("device", ""), environment.get("device_name", "")]))
        static = next((f["static"] for f in facts.values() if "static" in f), "")
        parts = [
            self._report.tool,
            next(iter(models)) if len(models) == 1 else f"{len(models)} models",
            " and ".join(dict.fromkeys(s["quant"] for s in specs)) if len(specs) < 4 else f"{len(specs)} cases",
            *([f"static audit: {static}"] if static else [f"prepared by {by}", where]),
            "in this process" if subject.get("in_process") else "",
        ]
        return " · ".join(filter(None, parts))

    def _changes(self) -> Iterator[Line]:
        """What the gate found, a line each."""
        if self._report.gate is None:
            return
        yield "", ""
        for breach in map(Breach.from_json, self._report.gate["breaches"]):
            yield f"{'✗' if breach.counted else '!'} {breach.line}", "bold red" if breach.counted else "yellow"
        for note in self._report.gate["notes"]:
            yield f"  {note}", "dim"

    def finding(self, variants: Sequence[Finding]) -> Iterator[Line]:
        """One broken rule, or what could not be judged; ``variants`` are its failures, which differ between cases."""
        first = variants[0]
        style = "bold red" if first.counted or first.error else "bold yellow"
        mark = "✗" if first.counted or first.error else "!"
        rule = None if first.error else self._known.get(first.rules[0])
        if first.error:
            yield self._ends(f"{mark} {_codes(first.rules, self._known)} could not be judged", "ERROR"), style
        else:
            parties = dict.fromkeys(d.party for f in variants for d in deviations(f.failures))
            title = f"{mark} {first.rules[0]} {rule.name if rule else ''}".rstrip()
            yield self._ends(f"{title}  ({first.level.value})", " and ".join(map(self._whose, parties))), style
        if rule is not None:
            yield from self._wrapped(rule.requirement, "", INDENT)
        shown = variants if self._verbose else variants[:SIGNATURES]
        for variant in shown:
            yield from self._variant(variant)
        if rest := sum(len(v.cases) for v in variants[len(shown) :]):
            yield f"{INDENT}… and otherwise in {rest} more {'case' if rest == 1 else 'cases'} (-v lists them)", "dim"
        if rule is not None:
            for title, heading in (("You will see", "Symptom"), ("Do", "Fix")):
                if text := rule.section(heading):
                    yield from self._wrapped(f"{title}: {text}", "", INDENT)
        if again := command(self._report, first.cases[0], first.rules[0]):
            yield f"{INDENT}Again: {again}", "cyan"

    def _variant(self, finding: Finding) -> Iterator[Line]:
        if len(self._cases) > 1:
            yield from self._wrapped(f"In {self._in(finding.cases)}:", "dim", INDENT)
        found = deviations(finding.failures)
        shown = found if self._verbose else found[:SHOWN]
        for deviation in shown:
            yield from self._deviation(deviation)
        if rest := sum(len(d.where) for d in found[len(shown) :]):
            yield f"{INDENT}… and {rest} more (-v lists them)", "dim"
        if finding.reason:
            yield from self._wrapped(finding.reason, "", INDENT)

    def _deviation(self, deviation: Deviation) -> Iterator[Line]:
        where = deviation.where if self._verbose else deviation.where[:PLACES]
        rest = len(deviation.where) - len(where)
        places = ", ".join(where) + (f", and {rest} more (-v lists them)" if rest else "")
        yield from self._wrapped(places, "bold", INDENT + "- ", hanging=INDENT + "  ")
        yield from self._wrapped(f"expected {deviation.expected}; found {deviation.actual}", "", INDENT + "  ")
        if deviation.witness:
            whose = self._whose(deviation.party)
            yield from self._wrapped(f"{whose}: {deviation.witness}", "dim", INDENT + "  ")

    def _in(self, cases: tuple[str, ...]) -> str:
        if set(cases) == set(self._cases):
            return f"all {len(cases)} cases"
        rest = 0 if self._verbose else len(cases) - CASES
        return ", ".join(cases[:CASES] if rest > 0 else cases) + (f", and {rest} more" if rest > 0 else "")

    def _passed_and_skipped(self) -> Iterator[Line]:
        several = len(self._cases) > 1
        for status, word in ((Status.PASS, "kept"), (Status.SKIP, "not applicable")):
            found = [r for r in self._report.results if r.status is status]
            if found:
                yield "", ""
                yield word, "bold"
            for result in found:
                name = self._known[result.rule].name if result.rule in self._known else ""
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

    def _whose(self, party: Party) -> str:
        if party is not Party.IMPLEMENTATION:
            return f"the {party.value}'s"
        return f"{self._report.subject.get('implementation', {}).get('name') or 'the implementation'}'s"

    def _ends(self, left: str, right: str) -> str:
        gap = self._width - len(left) - len(right)
        return f"{left}{' ' * gap}{right}" if right and gap > 1 else f"{left}  {right}".rstrip()

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


def _named(model: str, facts: Mapping[str, Any]) -> str:
    size = facts.get("parameters")
    about = ", ".join(
        filter(None, [facts.get("model_class", ""), scaled(size, ("", "K", "M", "B", "T")).rstrip() if size else ""])
    )
    return f"{model} ({about})" if about else model


def _codes(codes: tuple[str, ...], known: Mapping[str, Rule]) -> str:
    if len(codes) == 1:
        return f"{codes[0]} {known[codes[0]].name}" if codes[0] in known else codes[0]
    return f"{len(codes)} rules ({', '.join(codes[:4])}{', …' if len(codes) > 4 else ''})"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"
