"""The report as one HTML file that needs no other: no network, light and dark, readable without a mouse."""

from kbitcheck.compare.gate import breaches
from kbitcheck.core.report import Report
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.broken_rules import BrokenRule, broken_rules
from kbitcheck.report.parts.charts import charts
from kbitcheck.report.parts.cuts import cuts
from kbitcheck.report.parts.header import header
from kbitcheck.report.parts.notes import notes
from kbitcheck.report.parts.repro import command
from kbitcheck.report.parts.table import rows
from kbitcheck.report.parts.verdict import outcome, verdict
from kbitcheck.report.rule_page import FAMILIES
from kbitcheck.report.templates import glossary, template

NOT_JUDGED = "Not judged"
MARKS = {"broken": "✗", "not judged": "?", "warning": "!", "kept": "✓", "not applicable": "·"}


def render(report: Report) -> str:
    """A whole page. Broken rules are grouped by family, the family of the worst first; the table has all results."""
    families: dict[str, list[BrokenRule]] = {}
    for broken in broken_rules(report):
        family = broken.rule.family if broken.rule else NOT_JUDGED
        families.setdefault(FAMILIES.get(family, family), []).append(broken)
    outcomes: dict[str, dict[str, str]] = {}
    for result in report.results:
        outcomes.setdefault(result.case, {})[result.rule] = outcome(report, result)
    return template("report.html").render(
        report=report,
        header=header(report),
        verdict=verdict(report),
        cuts=list(cuts(report)),
        breaches=breaches(report),
        families=families,
        charts=charts(report),
        notes=notes(report),
        memory=_memory(report),
        memory_heading="The adapter" if report.subject.get("command") == "adapter" else "Memory",
        titles={code: rules().title(code) for code in sorted({r.rule for r in report.results})},
        outcomes=outcomes,
        marks=MARKS,
        command=command(report, next(iter(report.subject.get("cases", {})), "")),
        glossary=glossary(),
    )


def _memory(report: Report) -> list[tuple[str, list[str]]]:
    """The memory table by heading: lines of text, of which those of one heading stand under each other."""
    lines: list[tuple[str, list[str]]] = []
    for heading, cases, text in rows(report):
        if heading or not lines:
            lines.append((heading, []))
        lines[-1][1].append(f"{cases}: {text}" if cases else text)
    return lines
