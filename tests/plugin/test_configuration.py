"""In pytest the configuration gives defaults: it collects nothing by itself, and the ini file comes before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugin.conftest import Run

pytest_plugins = ["pytester"]

FILE = """
implementation = "good.py:prepare"
models = ["tiny:llama"]
quants = ["nf4"]
checkpointing = ["off"]
select = ["KB1", "KB2"]
ignore = {KB102 = "says nothing here"}
strict = true
timeout = 30
"""


def test_it_gives_what_the_options_leave_out(run: Run, subjects: Path) -> None:
    (subjects / "kbitcheck.toml").write_text(FILE)
    result = run("--kbit-impl=good.py:prepare", "--kbit-report=report.json")
    result.assert_outcomes(passed=3)
    report = json.loads((subjects / "report.json").read_text())
    assert [*report["subject"]["cases"]] == ["tiny:llama-nf4-off"]
    assert [r["rule"] for r in report["results"]] == ["KB101", "KB103", "KB201"]
    assert report["subject"]["ignored"] == {"KB102": "says nothing here"}
    assert report["strict"]
    typed = run("--kbit-impl=rude.py:prepare", "--kbit-model=tiny:gpt2", "--kbit-select=KB2")
    typed.assert_outcomes(failed=1)  # a SHOULD, which counts
    assert "tiny:gpt2-nf4-off" in typed.stdout.str()


def test_alone_it_collects_nothing(run: Run, subjects: Path) -> None:
    (subjects / "kbitcheck.toml").write_text(FILE)
    assert run().ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_ini_file_comes_first(run: Run, subjects: Path) -> None:
    (subjects / "kbitcheck.toml").write_text(FILE)
    (subjects / "pytest.ini").write_text("[pytest]\nkbit_impl = good.py:prepare\nkbit_model = tiny:gpt2\n")
    result = run("--collect-only", "-q")
    assert "tiny:gpt2-nf4-off" in result.stdout.str()
    assert "tiny:llama" not in result.stdout.str()


def test_its_ledger_is_for_its_own_implementation(run: Run, subjects: Path) -> None:
    (subjects / "kbitcheck.toml").write_text(f'{FILE}ledger = "none.toml"')
    own = run("--kbit-impl=good.py:prepare", "--collect-only")
    assert (own.ret, "no ledger" in own.stderr.str()) == (4, True)
    assert run("--kbit-impl=rude.py:prepare", "--collect-only").ret == 0


@pytest.mark.parametrize("how", ["an option", "a test module"])
def test_a_wrong_file_is_wrong_usage(run: Run, subjects: Path, how: str) -> None:
    (subjects / "kbitcheck.toml").write_text("strict = 1")
    (subjects / "test_own.py").write_text(
        "import pytest, kbitcheck.testing\n"
        "@pytest.fixture\ndef kbit_case(): return kbitcheck.testing.case('good.py:prepare', model='tiny:llama')\n"
        "def test_conformance(kbit_check): kbit_check()\n"
    )
    result = run(*["--kbit-impl=good.py:prepare"] * (how == "an option"))
    assert result.ret == 4
    assert "kbitcheck.toml: strict is true or false, not 1" in result.stderr.str() + result.stdout.str()


def test_a_wrong_file_is_nothing_to_a_suite_that_does_not_use_it(run: Run, subjects: Path) -> None:
    (subjects / "kbitcheck.toml").write_text("strict = 1")
    (subjects / "test_own.py").write_text("def test_ordinary(): pass\n")
    run().assert_outcomes(passed=1)
