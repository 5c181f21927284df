"""``kbit_check``, ``kbit_case`` and ``kbitcheck.testing.parametrize`` in a test module."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbitcheck import UsageError, testing
from kbitcheck.pytest_plugin import specs
from kbitcheck.run.importable import importable_name
from tests.plugin.conftest import ALONE_OR_SPREAD, ONE, Run, builds, untimed

pytest_plugins = ["pytester"]

OVERRIDDEN = """
import pytest, kbitcheck.testing

@pytest.fixture
def kbit_case():
    return kbitcheck.testing.case("good.py:prepare", model="tiny:gpt2")

def test_own(kbit_check):
    kbit_check()
"""

PARAMETRIZED = """
import kbitcheck.testing
import good

@kbitcheck.testing.parametrize(good.prepare, models=["tiny:gpt2"], quants=["nf4"], checkpointing=["off"], select=["KB1"])
def test_good(kbit_check):
    kbit_check()
"""


def test_the_default_case_is_the_options(run: Run, subjects: Path) -> None:
    """And shares its build with what the options collect."""
    (subjects / "test_fork.py").write_text("def test_fork(kbit_check):\n    kbit_check()\n")
    result = run("--kbit-impl=good.py:prepare", *ONE, "-v")
    result.stdout.fnmatch_lines(["test_fork.py::test_fork*KB103-returns*tiny:llama-nf4-off* PASSED*"])
    assert (result.ret, builds(subjects)) == (0, 1)
    result.assert_outcomes(passed=8, skipped=2)


@ALONE_OR_SPREAD
def test_an_overridden_case(run: Run, subjects: Path, workers: str) -> None:
    (subjects / "test_fork.py").write_text(OVERRIDDEN)
    result = run("--kbit-report=report.json", "--strict-markers", workers)
    assert (result.ret, builds(subjects)) == (0, 1)
    result.assert_outcomes(passed=4, skipped=1)
    assert {r["case"] for r in untimed(subjects / "report.json")["results"]} == {"tiny:gpt2-nf4-default"}


def test_an_extended_case_keeps_the_options_cases(run: Run, subjects: Path) -> None:
    (subjects / "test_fork.py").write_text(
        "import dataclasses, pytest\n@pytest.fixture\ndef kbit_case(kbit_case):\n"
        "    return dataclasses.replace(kbit_case, rank=8)\ndef test_fork(kbit_check):\n    kbit_check()\n"
    )
    result = run("test_fork.py", "--kbit-impl=good.py:prepare", *ONE, "--kbit-select=KB103", "-v")
    result.assert_outcomes(passed=2)
    assert builds(subjects) == 2


def test_parametrize(run: Run, subjects: Path) -> None:
    (subjects / "test_fork.py").write_text(PARAMETRIZED)
    result = run("-v", "-m", "kbit")
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(["*test_good*KB103-returns*tiny:gpt2-nf4-off*"])
    result.stdout.fnmatch_lines(["*prepared by good:prepare*"])
    assert (result.ret, builds(subjects)) == (0, 1)


def test_a_failure_in_a_module(run: Run, subjects: Path) -> None:
    (subjects / "test_fork.py").write_text(OVERRIDDEN.replace("good.py", "nothing.py"))
    result = run()
    assert result.ret == 1
    text = result.stdout.str()
    assert "expected the model; found None" in text[: text.index("= kbitcheck =")]
    assert "def test_own" not in text


def test_a_test_that_forgets_to_call_is_no_pass(run: Run, subjects: Path) -> None:
    (subjects / "test_fork.py").write_text(OVERRIDDEN.replace("    kbit_check()", "    pass"))
    result = run()
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*the test did not judge it*"])


def test_no_case_at_all_is_told(run: Run, subjects: Path) -> None:
    (subjects / "test_fork.py").write_text("def test_fork(kbit_check):\n    kbit_check()\n")
    result = run()
    assert result.ret == 2
    result.stdout.fnmatch_lines(["kbit_check has no case: give --kbit-impl, or override the fixture kbit_case"])


def test_several_implementations_get_a_report_each(run: Run, subjects: Path) -> None:
    (subjects / "test_fork.py").write_text(OVERRIDDEN)
    result = run("--kbit-impl=rude.py:prepare", *ONE, "--kbit-report=report.json")
    assert result.ret == 0
    names = {untimed(subjects / f)["subject"]["implementation"]["name"] for f in ("report.json", "report.2.json")}
    assert names == {"rude.py:prepare", "good.py:prepare"}


def module_level() -> None:
    """Something with a name."""


def test_a_function_has_a_name_by_which_another_process_imports_it() -> None:
    import kbitcheck_reference

    named = importable_name(kbitcheck_reference.prepare_model_for_kbit_training)
    assert named == "kbitcheck_reference.prepare:prepare_model_for_kbit_training"
    assert importable_name("peft") == "peft"
    assert importable_name(module_level).endswith(":module_level")
    for unnamed in (lambda model: model, object()):
        with pytest.raises(UsageError, match="has no name"):
            importable_name(unnamed)  # type: ignore[arg-type]


def test_a_case_is_checked() -> None:
    assert testing.case("peft", model="tiny:llama").id == "tiny:llama-nf4-default"
    assert specs.as_spec({"implementation": "peft", "model": "m", "quant": "int8"}).quant == "int8"
    with pytest.raises(UsageError, match="not a case"):
        testing.case("peft", model="tiny:llama", colour="blue")
    with pytest.raises(UsageError, match="nf5"):
        testing.case("peft", model="tiny:llama", quant="nf5")
