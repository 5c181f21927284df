"""``pytest --kbit-impl`` without a line of test code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kbitcheck.run import suites as suite
from tests.plugin.conftest import ALONE_OR_SPREAD, ONE, TWO, Run, builds, untimed

pytest_plugins = ["pytester"]

CASE = "tiny:llama-nf4-off"


def test_one_item_for_each_rule_and_case(run: Run, subjects: Path) -> None:
    """In an empty directory; nothing is started to list them."""
    result = run("--kbit-impl=good.py:prepare", *TWO, "--collect-only", "-q")
    listed = [line for line in result.outlines if "::" in line]
    codes = ["KB101-always-kept", "KB102-not-applicable", "KB103-returns", "KB201-says-please", "KB901-stack-works"]
    cases = [CASE, "tiny:gpt2-nf4-off"]
    assert listed == [f"kbitcheck/{case}::{code}[{case}]" for case in cases for code in codes]
    assert (result.ret, builds(subjects)) == (0, 0)


MODES = [
    ("-p", "no:xdist"),
    (),
    ("-n0",),
    ("-n2",),
    *[pytest.param(("-n2", "--dist", m), marks=pytest.mark.slow) for m in ("loadfile", "loadscope", "worksteal")],
]


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    """The report of the first mode, once it was made."""
    return {}


@pytest.mark.xdist_group("modes")
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_one_build_a_case_and_the_same_report(
    run: Run, subjects: Path, first: dict[str, Any], mode: tuple[str, ...]
) -> None:
    result = run("--kbit-impl=good.py:prepare", "--kbit-report=report.json", *mode)
    quick = suite.cases(suite.QUICK, implementation="good.py:prepare")
    in_int8 = sum(case.quant == "int8" for case in quick)  # where the stubs' KB901 fails
    assert (result.ret, builds(subjects)) == (0, len(quick))
    result.assert_outcomes(passed=4 * len(quick) - in_int8, skipped=len(quick), xfailed=in_int8)
    assert sum(line.startswith("✓ conforms") for line in result.outlines) == 1
    found = untimed(subjects / "report.json")
    assert Path(found["subject"]["implementation"].pop("file")) == subjects / "good.py"
    assert (len(found["results"]), found["complete"], found["exit_code"]) == (5 * len(quick), True, 0)
    order = [(r["case"], r["rule"]) for r in found["results"]]
    assert order == sorted(order)
    first.update(first or found)
    assert found == first


def test_a_failure_is_told_as_in_the_report(run: Run) -> None:
    result = run("--kbit-impl=nothing.py:prepare", *ONE)
    result.assert_outcomes(failed=1, passed=2, skipped=1, xfailed=1)
    assert result.ret == 1
    text = result.stdout.str()
    failures = text[text.index("= FAILURES =") : text.index("= kbitcheck =")]
    assert f"_ KB103-returns[{CASE}] _" in failures
    assert "expected the model; found None" in failures
    assert "You will see: None where a model was." in failures
    assert (
        "Again: kbitcheck impl nothing.py:prepare --model tiny:llama --quant nf4 --checkpointing off --select"
        in failures
    )
    assert "runner.py" not in failures


def test_what_is_not_counted_is_an_xfail_with_a_reason(run: Run) -> None:
    result = run("--kbit-impl=rude.py:prepare", "--kbit-model=tiny:llama", "--kbit-quant=int8", "-rx")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["XFAIL*KB201-says-please*(SHOULD, attributed to the implementation): reported, not counted"]
    )
    result.stdout.fnmatch_lines(["XFAIL*KB901-stack-works*(MUST, attributed to the stack): reported, not counted"])


def test_strict_counts_a_should(run: Run) -> None:
    assert run("--kbit-impl=rude.py:prepare", *ONE, "--kbit-strict").ret == 1


@ALONE_OR_SPREAD
def test_what_broke_is_an_error_and_lifts_the_exit_status(run: Run, subjects: Path, workers: str) -> None:
    result = run("--kbit-impl=killed.py:prepare", *ONE, "--kbit-report=report.json", workers)
    result.assert_outcomes(errors=3, passed=1, skipped=1)
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*the process was killed by SIGKILL*"])
    statuses = [r["status"] for r in untimed(subjects / "report.json")["results"]]
    assert statuses == ["PASS", "SKIP", "ERROR", "ERROR", "ERROR"]


def test_what_ends_its_process_where_the_reference_does_not_fails_one_rule(run: Run) -> None:
    result = run("--kbit-impl=leaves.py:prepare", *ONE)
    result.assert_outcomes(failed=1, passed=1, skipped=3)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*the process ended itself with exit code 7*"])


@ALONE_OR_SPREAD
def test_an_implementation_that_cannot_be_imported_is_wrong_usage(run: Run, subjects: Path, workers: str) -> None:
    result = run("--kbit-impl=import_error.py:prepare", "--kbit-report=report.json", workers)
    assert result.ret == 4
    result.stdout.fnmatch_lines(["wrong usage: *cannot be imported: ModuleNotFoundError*"])
    assert not (subjects / "report.json").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--kbit-impl=absent.py:prepare", "no such file"),
        ("--kbit-select=KB7", "no rule matches 'KB7'"),
        ("--kbit-model=tiny:lama", "no such model"),
        ("--kbit-quant=nf5", "nf5"),
        ("--kbit-checkpointing=on", "no such --kbit-checkpointing: 'on'"),
        ("--kbit-profile=best", "no such --kbit-profile"),
        ("--kbit-suite=some", "no such --kbit-suite"),
        ("--kbit-timeout=0", "--kbit-timeout wants"),
        ("--kbit-device=abacus", "no such device"),
        ("--kbit-report=report.odt", "the suffix names no format"),
        ("--kbit-report=no/such/report.json", "cannot write --kbit-report"),
    ],
)
def test_wrong_options_are_one_line(run: Run, option: str, told: str) -> None:
    result = run("--kbit-impl=good.py:prepare", option)
    (line,) = [line for line in result.errlines if line]
    assert (result.ret, told in line) == (4, True), line


@ALONE_OR_SPREAD
def test_a_broken_rule_decides_before_one_that_could_not_be_judged(run: Run, subjects: Path, workers: str) -> None:
    half = ("--kbit-impl=half_judged.py:prepare", *ONE, workers)
    assert run(*half).ret == 1
    assert run(*half, "--kbit-select=KB101,KB201").ret == 3
    (subjects / "test_own.py").write_text("def test_ordinary():\n    assert False\n")
    assert run("test_own.py", *half, "--kbit-select=KB101,KB201").ret == 1


def test_nothing_checked_is_not_a_pass(run: Run) -> None:
    assert run("--kbit-impl=good.py:prepare", *ONE, "--kbit-select=KB102").ret == 5


def test_pytests_own_selection_works(run: Run, subjects: Path) -> None:
    (subjects / "test_own.py").write_text("def test_ordinary(): pass\n")
    impl = ("--kbit-impl=nothing.py:prepare", *TWO)
    run(*impl, "-m", "kbit", "--strict-markers").assert_outcomes(failed=2, passed=4, skipped=2, xfailed=2, deselected=1)
    run(*impl, "-k", "KB103 and gpt2").assert_outcomes(failed=1, deselected=10)
    run(*impl, "--lf").assert_outcomes(failed=2, deselected=9)
    run(*impl, "--deselect", "kbitcheck/tiny:gpt2").assert_outcomes(
        failed=1, passed=3, skipped=1, xfailed=1, deselected=5
    )
    assert run("test_own.py", "--kbit-impl=good.py:prepare", *ONE).parseoutcomes()["passed"] == 5


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_stopping_at_the_first_failure_leaves_an_incomplete_report(run: Run, subjects: Path, workers: str) -> None:
    result = run("--kbit-impl=nothing.py:prepare", *TWO, "-x", "--kbit-report=report.json", workers)
    assert result.ret == (1 if workers == "-n0" else 2)
    found = untimed(subjects / "report.json")
    assert (found["complete"], found["exit_code"], len(found["results"])) == (False, 2, 10)
    assert "not run: the test session stopped early" in {r.get("reason") for r in found["results"]}


def test_a_dead_xdist_worker_is_no_pass(run: Run, subjects: Path) -> None:
    """It dies in the middle of a test; its cell is an ERROR, the others are judged by its successor."""
    (subjects / "conftest.py").write_text(
        "import os\ndef pytest_runtest_setup(item):\n    if item.name.startswith('KB103'): os._exit(9)\n"
    )
    result = run("--kbit-impl=good.py:prepare", *ONE, "-n2", "--kbit-report=report.json")
    assert result.ret == 3
    found = {r["rule"]: (r["status"], r.get("reason", "")) for r in untimed(subjects / "report.json")["results"]}
    assert len(found) == 5
    assert found["KB103"][0] == "ERROR"
    assert "crashed" in found["KB103"][1]
    assert {found[code][0] for code in ("KB101", "KB201", "KB901")} == {"PASS"}


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_a_failed_setup_is_no_pass(run: Run, subjects: Path, workers: str) -> None:
    (subjects / "conftest.py").write_text(
        "def pytest_runtest_setup(item):\n    if item.name.startswith('KB103'): raise OSError('no disk')\n"
    )
    result = run("--kbit-impl=good.py:prepare", *ONE, "--kbit-report=report.json", workers)
    assert result.ret == 3
    (error,) = [r for r in untimed(subjects / "report.json")["results"] if r["status"] == "ERROR"]
    assert (error["rule"], error["case"]) == ("KB103", CASE)
    assert "no disk" in error["reason"]


def test_junit_names_rule_and_case(run: Run, subjects: Path) -> None:
    run("--kbit-impl=nothing.py:prepare", *ONE, "--junitxml=junit.xml")
    cases = {c.get("name"): c for c in ElementTree.parse(subjects / "junit.xml").iter("testcase")}
    failed = cases[f"KB103-returns[{CASE}]"]
    assert failed.get("classname") == "kbitcheck.tiny:llama-nf4-off"
    (failure,) = failed.iter("failure")
    assert "expected the model; found None" in (failure.text or "")


@pytest.mark.parametrize("table", ["[tool.pytest.ini_options]", "[tool.pytest]"])
def test_options_from_pyproject(run: Run, subjects: Path, table: str) -> None:
    """The implementation and the report are seen from the root directory, wherever pytest is started."""
    (subjects / "pyproject.toml").write_text(
        f"{table}\nkbit_impl = 'nothing.py:prepare'\nkbit_model = ['tiny:llama']\nkbit_quant = ['nf4']\n"
        "kbit_checkpointing = ['off']\nkbit_select = ['KB103']\nkbit_report = 'report.json'\nkbit_strict = true\n"
    )
    below = subjects / "below"
    below.mkdir()
    result = run(f"--rootdir={subjects}", "-c", "pyproject.toml", str(below))
    result.assert_outcomes(failed=1)
    assert json.loads((subjects / "report.json").read_text())["strict"] is True
    run("--kbit-impl=good.py:prepare").assert_outcomes(passed=1)


def test_a_report_as_text(run: Run, subjects: Path) -> None:
    run("--kbit-impl=good.py:prepare", *ONE, "--kbit-report=report.txt")
    assert "✓ conforms" in (subjects / "report.txt").read_text()
