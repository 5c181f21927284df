"""JUnit, SARIF and Markdown: each is read back by what others would read it with."""

from __future__ import annotations

import cProfile
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from kbitcheck.compare import gate
from kbitcheck.compare.accept import accept
from kbitcheck.compare.ledger import Ledger
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.report import FORMATS, junit, markdown, render, sarif
from tests.ledger.reports import INT8, NF4, OWN, STACK, report, result

FAIL, SKIP, ERROR = Status.FAIL, Status.SKIP, Status.ERROR
SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "sarif-2.1.0-rtm.5.json").read_text())
VALID = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
MIXED = report(
    result("KB505", NF4, FAIL),
    result("KB505", INT8, FAIL, level=Level.SHOULD),
    result("KB201", NF4, FAIL, STACK),
    result("KB101", NF4, SKIP),
    result("KB101", INT8, ERROR),
)
NASTY = "a\x00\x1b[31m|`b``c```<script>&amp;\ud800\uffff ](x) *d* @me #1 ]]> --> \n\n# title"


def nasty(text: str = NASTY) -> Report:
    seen = Observation(text, text, text, ok=False, party=Party.STACK, witness=text or "?")
    return report(
        result("KB505", NF4, FAIL, seen, level=Level.MUST),
        result("KB201", NF4, ERROR, reason=text),
        result("KB101", NF4, SKIP, reason=text),
        environment={"torch": text},
    )


RESULTS = 5_000


def large() -> Report:
    """Some 5,000 results of every rule; a tenth fails, each otherwise, and some could not be judged."""
    codes = list(rules())
    specs = [
        CaseSpec(model=f"tiny:m{i}", quant="nf4", implementation="fork:prepare", checkpointing="off")
        for i in range(-(-RESULTS // len(codes)))
    ]
    results: list[Result] = []
    for i, spec in enumerate(specs):
        for j, code in enumerate(codes):
            seen = [
                Observation(
                    f"model.layers.{n}.self_attn.{proj}_proj.weight", f"at most {i * j:,}", f"{n * i:,} B", ok=False
                )
                for n in range(6)
                for proj in "qkvo"
            ]
            status = (
                FAIL
                if (i + j) % 10 == 0
                else SKIP
                if (i + j) % 10 == 1
                else ERROR
                if (i + j) % 97 == 0
                else Status.PASS
            )
            results.append(result(code, spec.id, status, *(seen if status is FAIL else ()), seconds=0.012345))
    facts = {
        "bytes_by_group": {"loaded": {"quantized": 9, "norms": 2}, "prepared": {"quantized": 9, "norms": 4}},
        "activations": 100,
        "checkpointed": 20,
        "activations_by_block": {"blocks": ["h.0", "h.1"], "plain": [40, 60], "checkpointed": [10, 10]},
        "gradient_errors": {"layers": [f"h.{n}.q" for n in range(56)], "error": [0.01] * 56, "bound": [0.04] * 56},
    }
    subject = {
        "command": "impl",
        "implementation": {"name": "fork:prepare"},
        "cases": {s.id: s.as_json() for s in specs},
    }
    return Report(
        tool="kbitcheck 0",
        environment={},
        subject=subject,
        results=tuple(results),
        blame="own",
        facts={"cases": {s.id: facts for s in specs}, "seconds": 1.0},
    )


LARGE = large()


@pytest.mark.parametrize("form", FORMATS)
def test_a_large_report_renders_in_a_second_and_two_megabytes(form: str) -> None:
    assert len(LARGE.results) >= RESULTS
    render(MIXED, form)  # which imports matplotlib, once
    profile = cProfile.Profile()
    text = profile.runcall(render, LARGE, form)
    # Calls, not seconds: a processor of 2024 makes ten million of these in one, a shared and busy one a third of that.
    assert sum(entry.callcount for entry in profile.getstats()) < 10_000_000
    assert 5_000 < len(text.encode()) < 2_000_000


# JUnit


def test_junit_counts_what_it_holds() -> None:
    suites = ET.fromstring(junit.render(MIXED))
    assert [suites.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["6", "1", "1", "3"]
    for element in (suites, *suites):
        held = Counter(e.tag for e in element.iter())
        assert element.get("tests") == str(held["testcase"])
        assert element.get("failures") == str(held["failure"])
        assert element.get("errors") == str(held["error"])
        assert element.get("skipped") == str(held["skipped"])
    case = next(e for e in suites.iter("testcase") if e.find("failure") is not None)
    assert (case.get("classname"), case.get("name")) == (NF4, "KB505-one-hook-and-removable")
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("message") == "model.norm: expected float32; found float16"
    assert "again: kbitcheck impl fork:prepare" in str(failure.text)


def test_junit_tells_of_the_gate_in_a_suite_of_its_own() -> None:
    settled = gate.judge(MIXED, Ledger.parse(accept(report()), name="l.toml"))
    suites = ET.fromstring(junit.render(settled))
    (suite,) = [s for s in suites if "l.toml" in str(s.get("name"))]
    assert {str(e.get("type")) for e in suite.iter("failure")} == {"regressed", "lost"}
    assert suites.get("failures") == str(len(list(suites.iter("failure"))))
    assert suites.get("tests") == str(len(list(suites.iter("testcase"))))


@given(st.text())
def test_junit_is_xml_whatever_the_evidence(text: str) -> None:
    ET.fromstring(junit.render(nasty(text)).encode("utf-8", "surrogatepass").decode("utf-8", "replace"))


def test_junit_escapes_what_xml_cannot_hold() -> None:
    text = junit.render(nasty())
    ET.fromstring(text.encode())
    assert "\x00" not in text
    assert "<script>" not in text


# SARIF


def only_run(text: str) -> Any:
    data = json.loads(text)
    assert [f"{list(e.path)}: {e.message}" for e in VALID.iter_errors(data)] == []
    return data["runs"][0]


def test_the_schema_bites() -> None:
    data = json.loads(sarif.render(MIXED))
    data["runs"][0]["results"][0]["level"] = "fatal"
    assert list(VALID.iter_errors(data))


@pytest.mark.parametrize("found", [report(), MIXED, nasty(), LARGE, report(complete=False)], ids=range(5))
def test_sarif_keeps_its_schema(found: Report) -> None:
    only_run(sarif.render(found))


def test_sarif_levels_follow_rule_and_fault() -> None:
    run = only_run(sarif.render(MIXED))
    assert [(r["ruleId"], r["level"], r["properties"]["counted"]) for r in run["results"]] == [
        ("KB201", "note", False),
        ("KB505", "error", True),
    ]
    assert run["results"][1]["properties"]["cases"] == [INT8, NF4]
    driver = run["tool"]["driver"]
    for found in run["results"]:
        assert driver["rules"][found["ruleIndex"]]["id"] == found["ruleId"]
    assert driver["rules"][-1]["help"]["text"].startswith("Why: ")
    (invocation,) = run["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (False, 1)
    assert "it broke" in invocation["toolExecutionNotifications"][0]["message"]["text"]


@pytest.mark.parametrize(("level", "told"), [(Level.MUST, "error"), (Level.SHOULD, "warning"), (Level.INFO, "note")])
def test_sarif_levels(level: Level, told: str) -> None:
    assert only_run(sarif.render(report(result("KB505", NF4, FAIL, level=level))))["results"][0]["level"] == told


def located(file: str, line: int, root: Path) -> Any:
    found = report(
        result("KB505", NF4, FAIL), subject={"implementation": {"name": "f:prepare", "file": file, "line": line}}
    )
    return only_run(sarif.render(found, root=root))["results"][0]["locations"][0]


def test_sarif_points_at_the_implementations_source(tmp_path: Path) -> None:
    inside = located(str(tmp_path / "my pkg" / "prepare.py"), 7, tmp_path)["physicalLocation"]
    assert inside["artifactLocation"] == {"uri": "my%20pkg/prepare.py", "uriBaseId": "%SRCROOT%"}
    assert inside["region"] == {"startLine": 7}
    outside = located("/opt/site-packages/peft.py", 0, tmp_path)["physicalLocation"]
    assert outside == {"artifactLocation": {"uri": "file:///opt/site-packages/peft.py"}, "region": {"startLine": 1}}
    assert "physicalLocation" not in located("<string>", 1, tmp_path)


def test_sarif_fingerprints_are_stable() -> None:
    def fingerprints(found: Report) -> list[str]:
        return [r["partialFingerprints"]["kbitcheck/v1"] for r in only_run(sarif.render(found))["results"]]

    one = fingerprints(report(result("KB505", NF4, FAIL)))
    other = dataclasses.replace(OWN, actual="bfloat16")
    assert fingerprints(report(result("KB505", NF4, FAIL, other), result("KB505", INT8, FAIL))) == one
    both = fingerprints(report(result("KB505", NF4, FAIL), result("KB201", NF4, FAIL)))
    assert len(set(both)) == 2


def test_sarif_suppresses_what_a_ledger_accepts() -> None:
    failing = report(result("KB505", NF4, FAIL))
    ledger = Ledger.parse(accept(failing).replace('reason = ""', 'reason = "two hooks"'))
    (found,) = only_run(sarif.render(gate.judge(failing, ledger)))["results"]
    assert found["suppressions"] == [{"kind": "external", "status": "accepted", "justification": "two hooks"}]
    both = report(result("KB505", NF4, FAIL), result("KB505", INT8, FAIL))
    held = [r for r in only_run(sarif.render(gate.judge(both, ledger)))["results"] if "suppressions" not in r]
    assert len(held) == 1


# Markdown


def parsed(text: str) -> list[Any]:
    return list(MarkdownIt("commonmark").enable("table").parse(text))


def test_markdown_fits_a_comment_and_says_what_is_left_out() -> None:
    text = markdown.render(LARGE)
    assert len(text) <= 65_536
    assert "left out to fit" in text
    assert text.count("<details") == text.count("</details>")
    assert "left out" not in markdown.render(MIXED)


def test_markdown_says_verdict_findings_and_what_to_do() -> None:
    text = markdown.render(MIXED)
    assert text.startswith("### ✗ does not conform: 1 rule broken, 1 could not be judged")
    assert "<b>KB505 one-hook-and-removable</b> (MUST, attributed to fork:prepare), 1 case<" in text
    assert "expected `float32`, found `float16`" in text
    assert "**Do**: " in text
    assert "Again: `kbitcheck impl fork:prepare" in text


def test_markdown_tells_a_rule_once_with_all_the_ways_it_fails() -> None:
    other = dataclasses.replace(OWN, actual="bfloat16")
    text = markdown.render(report(result("KB505", NF4, FAIL), result("KB505", INT8, FAIL, other)))
    assert text.count("<b>KB505 one-hook-and-removable</b>") == text.count("**Do**") == 1
    assert sorted(re.findall(r"found `(\w+)`", text)) == ["bfloat16", "float16"]
    assert text.count("\nIn `tiny:llama-") == 2
    assert "2 cases<br>Each embedding" in text


def test_markdown_lets_no_evidence_be_markup() -> None:
    settled = gate.judge(nasty(), Ledger.parse(accept(report())))
    for found in (nasty(), settled):
        text = markdown.render(found)
        for block in parsed(text):
            for token in block.children or ():
                assert token.type not in ("link_open", "em_open", "image"), block.content
                assert "script" not in token.content or token.type == "code_inline", block.content
            if block.type == "html_block":
                assert "script" not in block.content
        heads = [t for t in parsed(text) if t.type == "heading_open"]
        assert len(heads) == 1


def test_markdown_tables_keep_their_columns() -> None:
    settled = gate.judge(nasty(), Ledger.parse(accept(report())))
    tokens = parsed(markdown.render(settled))
    row: list[str] = []
    widths = set()
    for token in tokens:
        if token.type in ("td_open", "th_open"):
            row.append(token.type)
        elif token.type == "tr_close":
            widths.add(len(row))
            row = []
    assert widths == {6, 2}
