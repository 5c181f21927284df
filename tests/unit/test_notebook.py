"""What a notebook shows of a report, what one types next, and a badge."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from typing import Any

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.report import Blame, Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.report import badge, html
from kbitcheck.report.parts import repro


def result(rule: str, status: Status, level: Level = Level.MUST) -> Result:
    failures = (Observation("x", "a", "b", ok=False),) if status is Status.FAIL else ()
    party = Party.IMPLEMENTATION if failures else None
    return Result(
        rule=rule,
        case="c",
        level=level,
        status=status,
        attributed_to=party,
        examined=1,
        reason="r" * (not failures),
        failures=failures,
    )


def report(*results: Result, blame: Blame = "own", complete: bool = True) -> Report:
    return Report(tool="kbitcheck", environment={}, subject={}, results=results, blame=blame, complete=complete)


MIXED = report(
    result("KB101", Status.PASS),
    result("KB505", Status.FAIL, Level.SHOULD),
    result("KB301", Status.ERROR),
    result("KB201", Status.FAIL),
    result("KB102", Status.SKIP),
)


def test_a_notebook_shows_the_html_report_in_a_frame_that_loads_nothing() -> None:
    shown = MIXED._repr_html_()
    assert shown.startswith("<iframe ")
    inside = shown.partition('srcdoc="')[2].partition('"></iframe>')[0]
    assert unescape(inside) == html.render(MIXED)
    assert " src=" not in shown


def test_findings_are_what_failed_with_what_counts_first() -> None:
    assert [r.rule for r in MIXED.findings] == ["KB201", "KB301", "KB505"]
    assert report(result("KB101", Status.PASS)).findings == ()


def test_the_dictionary_is_the_json_report() -> None:
    assert json.loads(json.dumps(MIXED.to_dict())) == MIXED.as_json()
    assert Report.from_json(MIXED.to_dict()) == MIXED


def test_a_prompt_shows_a_report_as_one_line() -> None:
    assert repr(MIXED) == "<Report: exit code 1, 5 results, 3 findings>"


def in_process(implementation: str, rule: str = "KB201", **options: Any) -> str:
    """The line under a failure of a run in this process."""
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation=implementation, checkpointing="off", **options)
    subject = {"command": "impl", "in_process": True, "cases": {spec.id: spec.as_json()}}
    failing = replace(result(rule, Status.FAIL), case=spec.id, failures=(Observation("a use: x", "a", "b", ok=False),))
    return repro.command(replace(report(failing), subject=subject), spec.id, rule)


def test_a_function_that_no_command_can_import_is_run_again_by_python() -> None:
    expected = "prepare, models=['tiny:llama'], quants=['nf4'], checkpointing=['off'], select=['KB201']"
    assert in_process("prepare", device="auto", conditions="few") == f"kbitcheck.check_implementation({expected})"
    assert "checkpointing=['off'], seed=3, select" in in_process("prepare", seed=3)
    assert "conditions='a use', select=['KB515']" in in_process("prepare", "KB515")


@pytest.mark.parametrize("name", ["a.b:prepare", "c.py:prepare", "peft", "reference"])
def test_a_function_with_a_name_is_run_again_by_the_command(name: str) -> None:
    assert in_process(name).startswith(f"kbitcheck impl {name} --model tiny:llama ")


@pytest.mark.parametrize(
    ("shown", "message", "color"),
    [
        (report(result("KB101", Status.PASS)), "conforms", "brightgreen"),
        (report(result("KB201", Status.FAIL)), "does not conform", "red"),
        (report(result("KB201", Status.ERROR)), "could not be judged", "lightgrey"),
        (report(result("KB201", Status.SKIP)), "nothing was checked", "lightgrey"),
        (report(result("KB101", Status.PASS), complete=False), "interrupted", "lightgrey"),
    ],
    ids=["conforms", "broken", "error", "nothing", "interrupted"],
)
def test_a_badge_says_the_answer_in_words_and_colour(shown: Report, message: str, color: str) -> None:
    data = json.loads(badge.render(shown))
    assert (data["schemaVersion"], data["label"], data["color"]) == (1, "kbitcheck", color)
    assert message in data["message"]
