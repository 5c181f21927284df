"""The report as SARIF 2.1.0, for code scanning: an alert for each broken rule, on the implementation's source line."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Result, Status
from kbitcheck.core.rule import Rule, rules
from kbitcheck.report.parts.broken_rules import evidence
from kbitcheck.report.parts.limits import BRIEF, listed
from kbitcheck.report.rule_page import first_sentence, rule_page

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {Level.MUST: "error", Level.SHOULD: "warning", Level.INFO: "note"}
ROOT = "%SRCROOT%"


def render(report: Report, *, root: Path | None = None) -> str:
    """One run. Source files under ``root`` (the working directory by default) are named relative to it.

    Failures of a rule are one result whatever the number of cases, so that an alert keeps its identity when cases are
    added or removed. A failure that is not attributed to the implementation is a note; one that the ledger accepts is
    suppressed, with the reason. Errors are notifications: they concern the run, not the source.
    """
    root = (root or Path.cwd()).resolve()
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in report.results:
        if result.status is Status.FAIL:
            groups.setdefault((result.rule, not _held(report, result)), []).append(result)
    codes = sorted({r.rule for r in report.results})
    driver = {
        "name": "kbitcheck",
        "version": report.tool.partition(" ")[2] or report.tool,
        "rules": [_rule(code, rules().get(code)) for code in codes],
    }
    invocation = {
        "executionSuccessful": report.complete and not report.not_judged,
        "exitCode": report.exit_code,
        "toolExecutionNotifications": [_notification(r, codes) for r in report.results if r.status is Status.ERROR],
    }
    location = _location(report.subject.get("implementation", {}), root)
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "originalUriBaseIds": {ROOT: {"uri": root.as_uri().rstrip("/") + "/"}},
        "results": [
            {"ruleIndex": codes.index(code), "locations": [location], **_alert(report, failures, held=not others)}
            for (code, others), failures in sorted(groups.items(), key=lambda group: group[0])
        ],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _held(report: Report, result: Result) -> bool:
    """Whether the implementation answers for the failure, counted or not."""
    return report.counts(result) or (not result.finding and (result.own or report.blame == "any"))


def _rule(code: str, rule: Rule | None) -> dict[str, Any]:
    if rule is None:
        return {"id": code}
    explanations = rule_page(rule).explanations
    return {
        "id": code,
        "name": rule.name,
        "shortDescription": {"text": first_sentence(rule.requirement) + "."},
        "fullDescription": {"text": rule.requirement},
        "help": {
            "text": "\n\n".join(f"{title}: {text}" for title, text in explanations) or rule.requirement,
            "markdown": "\n\n".join(f"**{title}**: {text}" for title, text in explanations) or rule.requirement,
        },
        "defaultConfiguration": {"level": LEVELS[rule.level]},
        "properties": {"tags": [rule.family, rule.level.value]},
    }


def _notification(result: Result, codes: Sequence[str]) -> dict[str, Any]:
    return {
        "level": "error",
        "message": {"text": f"{result.rule} on {result.case} could not be judged: {result.reason}"},
        "associatedRule": {"id": result.rule, "index": codes.index(result.rule)},
    }


def _alert(report: Report, failures: Sequence[Result], *, held: bool) -> dict[str, Any]:
    code = failures[0].rule
    rule = rules().get(code)
    cases = listed(list(dict.fromkeys(r.case for r in failures)), BRIEF.cases)
    lines = "\n".join(evidence(report, failures[0]))
    level = min((r.level for r in failures), key=tuple(LEVELS).index)
    identity = f"{code}\0{report.subject.get('implementation', {}).get('name', '')}\0{held}".encode()
    alert: dict[str, Any] = {
        "ruleId": code,
        "kind": "fail",
        "level": LEVELS[level] if held else "note",
        "message": {"text": f"{rule.requirement if rule else code}\nIn {cases}.\n{lines}"},
        "partialFingerprints": {"kbitcheck/v1": hashlib.sha256(identity).hexdigest()[:32]},
        "properties": {"cases": [r.case for r in failures], "counted": any(map(report.counts, failures))},
    }
    accepted = (report.gate or {}).get("accepted", ())
    reasons = {(entry["rule"], case): entry["reason"] for entry in accepted for case in entry["cases"]}
    why = [reasons.get((r.rule, r.case)) for r in failures]
    if None not in why:
        alert["suppressions"] = [{"kind": "external", "status": "accepted", "justification": why[0] or "no reason yet"}]
    return alert


def _location(implementation: Mapping[str, Any], root: Path) -> dict[str, Any]:
    name = implementation.get("name") or "?"
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": name, "kind": "function"}]}
    file = str(implementation.get("file") or "")
    if file and not file.startswith("<"):
        path = root / file  # an absolute path stays
        artifact = {"uri": path.as_uri()}
        if path.is_relative_to(root):
            artifact = {"uri": quote(path.relative_to(root).as_posix()), "uriBaseId": ROOT}
        region = {"startLine": max(int(implementation.get("line") or 0), 1)}
        location["physicalLocation"] = {"artifactLocation": artifact, "region": region}
    return location
