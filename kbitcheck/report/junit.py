"""The report as JUnit XML: a test case for each rule and case, which any CI shows."""

import re
from collections import Counter
from xml.etree import ElementTree as ET

from kbitcheck.compare.gate import breaches
from kbitcheck.core.report import Report
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.broken_rules import evidence
from kbitcheck.report.parts.repro import command

# What XML 1.0 cannot hold, even escaped.
CONTROL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """XML with one suite a case. A failure that is not counted is skipped, with its evidence as the message."""
    suites = ET.Element("testsuites", {"name": _plain(report.tool)})
    by_case: dict[str, list[Result]] = {}
    for result in report.results:
        by_case.setdefault(result.case, []).append(result)
    totals: Counter[str] = Counter()
    for case, results in by_case.items():
        suite = ET.SubElement(suites, "testsuite", {"name": _plain(case)})
        outcomes = Counter(_test(report, result, suite) for result in results)
        _count(suite, outcomes, sum(r.seconds for r in results))
        totals += outcomes
    if report.gate is not None:
        totals += _gate(report, suites)
    _count(suites, totals, report.facts.get("seconds") or 0.0)
    ET.indent(suites, " ")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(suites, encoding="unicode")}\n'


def _test(report: Report, result: Result, suite: ET.Element) -> str:
    """Add a test case with the element that says how it ended; returns which."""
    title = rules().title(result.rule).replace(" ", "-")
    named = {"classname": _plain(result.case), "name": title, "time": f"{result.seconds:.3f}"}
    test = ET.SubElement(suite, "testcase", named)
    lines = evidence(report, result)
    message = _plain(lines[0] if lines else result.status)
    if result.status is Status.PASS:
        return "passed"
    if result.status is Status.SKIP:
        ET.SubElement(test, "skipped", {"message": message})
        return "skipped"
    if result.status is Status.ERROR and (report.gate is None or report.counts(result)):
        ET.SubElement(test, "error", {"message": message, "type": "ERROR"})
        return "errors"
    if not report.counts(result):
        ET.SubElement(test, "skipped", {"message": f"not counted ({result.level}): {message}"})
        return "skipped"
    element = ET.SubElement(test, "failure", {"message": message, "type": result.level.value})
    again = command(report, result.case, result.rule)
    element.text = _plain("\n".join([*lines, *([f"again: {again}"] if again else [])]))
    return "failures"


def _gate(report: Report, suites: ET.Element) -> Counter[str]:
    """Add a suite for the gate: lost, stale and unexplained entries belong to no test case."""
    against = (report.gate or {})["against"]
    suite = ET.SubElement(suites, "testsuite", {"name": _plain(f"gate against {against}")})
    counted = [breach for breach in breaches(report) if breach.counted]
    for breach in counted:
        name = _plain(f"{breach.kind} {', '.join(breach.rules)}")
        test = ET.SubElement(suite, "testcase", {"classname": "gate", "name": name, "time": "0.000"})
        ET.SubElement(test, "failure", {"message": _plain(breach.line), "type": breach.kind.value})
    outcomes = Counter(failures=len(counted))
    _count(suite, outcomes, 0.0)
    return outcomes


def _count(element: ET.Element, outcomes: Counter[str], seconds: float) -> None:
    element.set("tests", str(outcomes.total()))
    for name in ("failures", "errors", "skipped"):
        element.set(name, str(outcomes[name]))
    element.set("time", f"{seconds:.3f}")


def _plain(text: str) -> str:
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
