"""The report as one HTML file that needs no other: no network, light and dark, readable without a mouse."""

from collections.abc import Mapping
from typing import Any

from kbitcheck.compare.gate import Breach, named
from kbitcheck.core.report import Report
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.charts import charts
from kbitcheck.report.parts.findings import Finding, findings
from kbitcheck.report.parts.repro import command
from kbitcheck.report.parts.verdict import outcome, verdict
from kbitcheck.report.rule_page import FAMILIES
from kbitcheck.report.templates import glossary, template

NOT_JUDGED = "Not judged"
MARKS = {"broken": "✗", "not judged": "?", "warning": "!", "kept": "✓", "not applicable": "·"}


def render(report: Report) -> str:
    """A whole page. Findings are grouped by family, the family of the worst first; the table has all results."""
    families: dict[str, list[Finding]] = {}
    for finding in findings(report):
        family = finding.rule.family if finding.rule and not finding.error else NOT_JUDGED
        families.setdefault(FAMILIES.get(family, family), []).append(finding)
    breaches = [Breach.from_json(breach) for breach in (report.gate or {"breaches": ()})["breaches"]]
    return template("report.html").render(
        report=report,
        good=report.exit_code == 0,
        verdict=verdict(report),
        breaches=[(breach, named(breach.rules)) for breach in breaches],
        families=families,
        charts=charts(report),
        table=_table(report),
        marks=MARKS,
        command=_whole_command(report),
        glossary=glossary(),
    )


def _table(report: Report) -> Mapping[str, Any]:
    """Every result: rules across, cases down."""
    registered = rules()
    codes = sorted({r.rule for r in report.results})
    rows: dict[str, dict[str, str]] = {}
    for result in report.results:
        rows.setdefault(result.case, {})[result.rule] = outcome(report, result)
    return {
        "codes": [(code, registered[code].name if code in registered else "") for code in codes],
        "rows": [(case, [cells.get(code, "") for code in codes]) for case, cells in rows.items()],
    }


def _whole_command(report: Report) -> str:
    """The command that repeats the first case with every rule."""
    cases = report.subject.get("cases", {})
    return command(report, next(iter(cases)), "KB").removesuffix(" --select KB") if cases else ""
