"""The report as one HTML file that needs no other: no network, light and dark, readable without a mouse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from kbitcheck.core.report import Report
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import Rule, rules
from kbitcheck.report.parts.charts import charts
from kbitcheck.report.parts.counts import Tally, kind
from kbitcheck.report.parts.evidence import clipped, whose_it_is
from kbitcheck.report.parts.findings import Finding, by_rule, deviations, findings
from kbitcheck.report.parts.repro import command

if TYPE_CHECKING:
    from jinja2 import Template

DEVIATIONS = 5
PLACES = 12
SIGNATURES = 4  # ways in which one rule failed that are shown
FAMILIES = {
    "freezing": "Freezing",
    "precision": "Precision and storage",
    "gradients": "Gradient flow",
    "checkpointing": "Gradient checkpointing",
    "contract": "Contract",
    "cost": "Cost of preparing",
    "composition": "Composition",
    "audit": "Facts about the model",
    "": "Not judged",
}
MARKS = {"broken": "✗", "not judged": "?", "warning": "!", "kept": "✓", "not applicable": "·"}


def render(report: Report) -> str:
    """A whole page. Findings are grouped by family, worst first; what passed is in the table of all results."""
    known = rules()
    families: dict[str, list[dict[str, Any]]] = {}
    for variants in by_rule(findings(report)):
        if report.gate is not None and not variants[0].counted:
            continue
        rule = None if variants[0].error else known.get(variants[0].rules[0])
        families.setdefault(rule.family if rule else "", []).append(_finding(report, variants, rule))
    tally = Tally(report)
    return template("report").render(
        report=report,
        good=report.exit_code == 0,
        verdict=tally.line(),
        breaches=_breaches(report),
        families=[(FAMILIES.get(f, f), families[f]) for f in sorted(families, key=_place)],
        charts=charts(report),
        table=_table(report),
        marks=MARKS,
        command=_whole_command(report),
    )


def _place(family: str) -> int:
    return [*FAMILIES, family].index(family)


@cache
def template(name: str) -> Template:
    """A page's template, by its file's name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kbitcheck.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    return environment.get_template(f"{name}.html.jinja")


def _prose(text: str) -> str:
    """What stands between backticks as code; all else in it stays text."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704  (escaped before)


def _finding(report: Report, variants: Sequence[Finding], rule: Rule | None) -> dict[str, Any]:
    first = variants[0]
    parties = dict.fromkeys(whose_it_is(report, d.party) for v in variants for d in deviations(v.failures))
    return {
        "counted": first.counted or first.error,
        "codes": ", ".join(first.rules[:6]) + (", …" if len(first.rules) > 6 else ""),
        "name": rule.name if rule else "could not be judged" if first.error else "",
        "level": "ERROR" if first.error else first.level.value,
        "whose": " and ".join(parties),
        "requirement": rule.requirement if rule else "",
        "variants": [_variant(report, variant) for variant in variants[:SIGNATURES]],
        "rest": sum(len(v.cases) for v in variants[SIGNATURES:]),
        "symptom": rule.section("Symptom") if rule else "",
        "fix": rule.section("Fix") if rule else "",
        "cases": len({case for v in variants for case in v.cases}),
        "again": command(report, first.cases[0], first.rules[0]),
    }


def _variant(report: Report, finding: Finding) -> dict[str, Any]:
    found = deviations(finding.failures)
    return {
        "reason": clipped(finding.reason),
        "deviations": [
            {
                "where": [clipped(w) for w in d.where[:PLACES]],
                "rest": max(len(d.where) - PLACES, 0),
                "expected": clipped(d.expected),
                "actual": clipped(d.actual),
                "witness": ""
                if d.party is Party.IMPLEMENTATION
                else f"{whose_it_is(report, d.party)}: {clipped(d.witness)}",
            }
            for d in found[:DEVIATIONS]
        ],
        "rest": max(len(found) - DEVIATIONS, 0),
        "cases": finding.cases,
    }


def _breaches(report: Report) -> list[Any]:
    if report.gate is None:
        return []
    from kbitcheck.compare.gate import Breach, named

    found = map(Breach.from_json, report.gate["breaches"])
    return [{"breach": b, "rules": named(b.rules)} for b in found]


def _table(report: Report) -> dict[str, Any]:
    """Every result: rules across, cases down."""
    codes = sorted({r.rule for r in report.results})
    rows: dict[str, dict[str, str]] = {}
    for result in report.results:
        rows.setdefault(result.case, {})[result.rule] = kind(report, result)
    seconds: dict[str, float] = {}
    for result in report.results:
        seconds[result.case] = seconds.get(result.case, 0.0) + result.seconds
    return {
        "codes": [(code, rules()[code].name if code in rules() else "") for code in codes],
        "rows": [
            (case, [(code, cells.get(code, "")) for code in codes], seconds[case]) for case, cells in rows.items()
        ],
        "passed": sum(r.status is Status.PASS for r in report.results),
    }


def _whole_command(report: Report) -> str:
    """The command that repeats the first case with every rule."""
    cases = report.subject.get("cases", {})
    if not cases:
        return ""
    again = command(report, next(iter(cases)), "KB")
    return again.removesuffix(" --select KB")
