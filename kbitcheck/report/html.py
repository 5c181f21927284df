"""The report as one HTML file that needs no other: no network, light and dark, readable without a mouse."""

from collections import defaultdict

from kbitcheck.compare.gate import breaches
from kbitcheck.core.report import Report
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.basis import basis
from kbitcheck.report.parts.broken_rules import BrokenRule, broken_rules
from kbitcheck.report.parts.changes import changes
from kbitcheck.report.parts.charts import charts
from kbitcheck.report.parts.cuts import cuts
from kbitcheck.report.parts.decisive import numbers
from kbitcheck.report.parts.fit_map import maps
from kbitcheck.report.parts.header import header
from kbitcheck.report.parts.notes import notes
from kbitcheck.report.parts.repro import command
from kbitcheck.report.parts.table import rows
from kbitcheck.report.parts.verdict import answer, outcome, verdict
from kbitcheck.report.rule_page import FAMILIES
from kbitcheck.report.templates import glossary, template

MARKS = {"broken": "✗", "not judged": "?", "warning": "!", "kept": "✓", "not applicable": "·"}
DECIDES, NOT_JUDGED, WARNS = "Decides the verdict", "Could not be judged", "Does not decide the verdict"


def render(report: Report) -> str:
    """A whole page. The first screen decides; broken rules follow by severity; the table has all results."""
    outcomes: dict[str, dict[str, str]] = {}
    for result in report.results:
        outcomes.setdefault(result.case, {})[result.rule] = outcome(report, result)
    fit_maps = maps(report)
    return template("report.html").render(
        report=report,
        tool=report.tool,
        skip_to="broken-rules",
        header=header(report),
        verdict=verdict(report),
        answer=answer(report),
        basis=basis(report),
        numbers=numbers(report),
        cuts=list(cuts(report)),
        changes=changes(breaches(report)),
        severities=_by_severity(report),
        families=defaultdict(str, FAMILIES),
        fit_maps=fit_maps,
        map_advice=_map_advice(report),
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


def _by_severity(report: Report) -> dict[str, list[BrokenRule]]:
    """Broken rules by what they do to the verdict, the worst first."""
    severities: dict[str, list[BrokenRule]] = {}
    for broken in broken_rules(report):
        severity = NOT_JUDGED if broken.error else DECIDES if broken.counted else WARNS
        severities.setdefault(severity, []).append(broken)
    return severities


def _map_advice(report: Report) -> str:
    """Where a report has no map, how to get one; nothing of what was given no model to train."""
    command = report.subject.get("command")
    if command not in ("model", "audit"):
        return ""
    reasons = [(f.get("forecast") or {}).get("missing") for f in report.facts.get("cases", {}).values()]
    why = next(
        (f"No step was predicted: {reason}. " for reason in reasons if reason),
        "This run predicted no steps of other shapes. ",
    )
    how = "`kbitcheck model` with `--memory 24GiB`, or a GPU such as `--memory T4`, predicts a step for each batch and length."
    return why + how


def _memory(report: Report) -> list[tuple[str, list[str]]]:
    """The memory table by heading: lines of text, of which those of one heading stand under each other."""
    lines: list[tuple[str, list[str]]] = []
    for heading, cases, text in rows(report):
        if heading or not lines:
            lines.append((heading, []))
        lines[-1][1].append(f"{cases}: {text}" if cases else text)
    return lines
