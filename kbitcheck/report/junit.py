"""The report as JUnit XML: a test case for each rule and case, which any CI shows."""

import re
from collections import Counter
from xml.etree import ElementTree as ET

from kbitcheck.compare.gate import Breach
from kbitcheck.core.report import Report
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.findings import evidence
from kbitcheck.report.parts.repro import command

# What XML 1.0 cannot hold, even escaped.
CONTROL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """XML with one suite a case. A failure that is not counted is skipped, with its evidence as the message."""
    suites = ET.Element("testsuites", {"name": _plain(report.tool)})
    registered = rules()
    by_case: dict[str, list[Result]] = {}
    for result in report.results:
        by_case.setdefault(result.case, []).append(result)
    totals: Counter[str] = Counter()
    for case, results in by_case.items():
        suite = ET.SubElement(suites, "testsuite", {"name": _plain(case)})
        counts: Counter[str] = Counter()
        for result in results:
            name = registered[result.rule].name if result.rule in registered else ""
            named = {"classname": _plain(case), "name": f"{result.rule}-{name}".rstrip("-")}
            test = ET.SubElement(suite, "testcase", {**named, "time": f"{result.seconds:.3f}"})
            counts[_outcome(report, result, test)] += 1
        totals += counts
        _count(suite, counts, len(results), sum(r.seconds for r in results))
    if report.gate is not None:
        _gate(report, suites, totals)
    _count(suites, totals, len(report.results) + _gate_tests(report), report.facts.get("seconds") or 0.0)
    ET.indent(suites, " ")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(suites, encoding="unicode")}\n'


def _outcome(report: Report, result: Result, test: ET.Element) -> str:
    """Give the test case the element that says how it ended; returns which."""
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


def _gate_tests(report: Report) -> int:
    return len([b for b in (report.gate or {"breaches": []})["breaches"] if b["counted"]])


def _gate(report: Report, suites: ET.Element, totals: Counter[str]) -> None:
    """Add a suite for the gate: lost, stale and unexplained entries belong to no test case."""
    assert report.gate is not None
    breaches = [Breach.from_json(b) for b in report.gate["breaches"] if b["counted"]]
    suite = ET.SubElement(suites, "testsuite", {"name": _plain(f"gate against {report.gate['against']}")})
    for breach in breaches:
        name = _plain(f"{breach.kind} {', '.join(breach.rules)}")
        test = ET.SubElement(suite, "testcase", {"classname": "gate", "name": name, "time": "0.000"})
        ET.SubElement(test, "failure", {"message": _plain(breach.line), "type": breach.kind.value})
    _count(suite, Counter(failures=len(breaches)), len(breaches), 0.0)
    totals["failures"] += len(breaches)


def _count(element: ET.Element, counts: Counter[str], tests: int, seconds: float) -> None:
    element.set("tests", str(tests))
    for name in ("failures", "errors", "skipped"):
        element.set(name, str(counts[name]))
    element.set("time", f"{seconds:.3f}")


def _plain(text: str) -> str:
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
