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
    registered = rules()
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in report.results:
        if result.status is Status.FAIL:
            groups.setdefault((result.rule, _held(report, result)), []).append(result)
    codes = sorted({r.rule for r in report.results})
    reasons = {(a["rule"], c): a["reason"] for a in (report.gate or {}).get("accepted", ()) for c in a["cases"]}
    driver = {
        "name": "kbitcheck",
        "version": report.tool.partition(" ")[2] or report.tool,
        "rules": [_rule(code, registered.get(code)) for code in codes],
    }
    invocation = {
        "executionSuccessful": report.complete and not report.not_judged,
        "exitCode": report.exit_code,
        "toolExecutionNotifications": [_notification(r, codes) for r in report.results if r.status is Status.ERROR],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "originalUriBaseIds": {ROOT: {"uri": root.as_uri().rstrip("/") + "/"}},
        "results": [
            _result(report, failures, codes, root, held=held, reasons=reasons)
            for (_, held), failures in sorted(groups.items(), key=lambda g: (g[0][0], not g[0][1]))
        ],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _held(report: Report, result: Result) -> bool:
    """Whether the implementation answers for the failure, counted or not."""
    return report.counts(result) or (not result.finding and (result.own or report.blame == "any"))


def _rule(code: str, rule: Rule | None) -> dict[str, Any]:
    if rule is None:
        return {"id": code}
    help_ = rule_page(rule).explanations
    return {
        "id": code,
        "name": rule.name,
        "shortDescription": {"text": first_sentence(rule.requirement) + "."},
        "fullDescription": {"text": rule.requirement},
        "help": {
            "text": "\n\n".join(f"{title}: {text}" for title, text in help_) or rule.requirement,
            "markdown": "\n\n".join(f"**{title}**: {text}" for title, text in help_) or rule.requirement,
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


def _result(
    report: Report,
    failures: Sequence[Result],
    codes: Sequence[str],
    root: Path,
    *,
    held: bool,
    reasons: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    first = failures[0]
    implementation = report.subject.get("implementation", {})
    name = str(implementation.get("name", ""))
    rule = rules().get(first.rule)
    cases = listed(list(dict.fromkeys(r.case for r in failures)), BRIEF.cases)
    lines = "\n".join(evidence(report, first))
    level = min((r.level for r in failures), key=tuple(LEVELS).index)
    identity = f"{first.rule}\0{name}\0{held}".encode()
    alert: dict[str, Any] = {
        "ruleId": first.rule,
        "ruleIndex": codes.index(first.rule),
        "kind": "fail",
        "level": LEVELS[level] if held else "note",
        "message": {"text": f"{rule.requirement if rule else first.rule}\nIn {cases}.\n{lines}"},
        "locations": [_location(name, implementation, root)],
        "partialFingerprints": {"kbitcheck/v1": hashlib.sha256(identity).hexdigest()[:32]},
        "properties": {"cases": [r.case for r in failures], "counted": any(map(report.counts, failures))},
    }
    why = [reasons.get((r.rule, r.case)) for r in failures]
    if all(w is not None for w in why):
        alert["suppressions"] = [{"kind": "external", "status": "accepted", "justification": why[0] or "no reason yet"}]
    return alert


def _location(name: str, implementation: Mapping[str, Any], root: Path) -> dict[str, Any]:
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": name or "?", "kind": "function"}]}
    file = str(implementation.get("file") or "")
    if file and not file.startswith("<"):
        path = Path(file) if Path(file).is_absolute() else root / file
        artifact = {"uri": path.as_uri()}
        if path.is_relative_to(root):
            artifact = {"uri": quote(path.relative_to(root).as_posix()), "uriBaseId": ROOT}
        region = {"startLine": max(int(implementation.get("line") or 0), 1)}
        location["physicalLocation"] = {"artifactLocation": artifact, "region": region}
    return location
