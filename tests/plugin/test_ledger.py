"""``--kbit-ledger``: the gate, a test at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.conftest import ALONE_OR_SPREAD, ONE, Run, untimed

pytest_plugins = ["pytester"]

CASE = "tiny:llama-nf4-off"
LEDGER = f"""schema = 1
implementation = "rude.py:prepare"

[judged]
rules = ["KB101", "KB102", "KB103", "KB201", "KB901"]
cases = ["{CASE}"]

[skipped]
"{CASE}" = ["KB102"]
"""
ACCEPTED = f"""
[[accepted]]
rule = "KB201"
status = "FAIL"
attributed_to = "implementation"
reason = "manners can wait"
cases = ["{CASE}"]
"""


@pytest.fixture
def gated(run: Run, subjects: Path) -> Run:
    def with_ledger(subject: str, ledger: str, *arguments: str) -> pytest.RunResult:
        (subjects / "kbit.toml").write_text(ledger)
        impl = (f"--kbit-impl={subject}.py:prepare", "--kbit-ledger=kbit.toml", "--kbit-report=report.json")
        return run(*impl, *ONE, *arguments)

    return with_ledger


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_what_is_accepted_is_an_xfail_with_its_reason(gated: Run, subjects: Path, workers: str) -> None:
    result = gated("rude", LEDGER + ACCEPTED, "-rx", workers)
    result.assert_outcomes(passed=3, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(["XFAIL*KB201*accepted: manners can wait"])
    assert (result.ret, untimed(subjects / "report.json")["exit_code"]) == (0, 0)


@ALONE_OR_SPREAD
def test_a_regression_is_named(gated: Run, workers: str) -> None:
    result = gated("nothing", LEDGER + ACCEPTED, workers)
    result.assert_outcomes(failed=1, passed=2, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines([f"regressed KB103 returns [[]{CASE}[]]*"])
    assert result.ret == 1


def test_an_entry_that_is_fixed_is_stale(gated: Run) -> None:
    result = gated("good", LEDGER + ACCEPTED)
    result.assert_outcomes(failed=1, passed=3, skipped=1)
    result.stdout.fnmatch_lines([f"stale KB201 says-please [[]{CASE}[]]*"])


def test_what_the_options_leave_out_fails_the_session_though_no_test_does(gated: Run) -> None:
    result = gated("rude", LEDGER.replace(f'cases = ["{CASE}"]', f'cases = ["{CASE}", "tiny:gpt2-nf4-off"]') + ACCEPTED)
    result.assert_outcomes(passed=3, skipped=1, xfailed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*unselected 5 rules*tiny:gpt2-nf4-off*left out by --kbit-model, --kbit-quant, --kbit-checkpointing*"]
    )


def test_a_case_that_no_option_leaves_out_is_lost(run: Run, subjects: Path) -> None:
    (subjects / "kbit.toml").write_text(LEDGER.replace(CASE, "tiny:opt-nf4-off"))
    result = run("--kbit-impl=rude.py:prepare", "--kbit-ledger=kbit.toml", "--kbit-select=KB101", "-k", "gpt2")
    result.stdout.fnmatch_lines(["*lost*KB101*tiny:opt-nf4-off*did not run*"])


@ALONE_OR_SPREAD
def test_what_was_deselected_is_not_lost(gated: Run, workers: str) -> None:
    assert gated("rude", LEDGER + ACCEPTED, "-k", "KB101", workers).ret == 0


def test_an_accepted_error_does_not_lift_the_exit_status(gated: Run) -> None:
    entries = "".join(
        f'[[accepted]]\nrule = "{code}"\nstatus = "ERROR"\nreason = "known to die"\ncases = ["{CASE}"]\n'
        for code in ("KB103", "KB201", "KB901")
    )
    result = gated("killed", LEDGER + entries)
    result.assert_outcomes(passed=1, skipped=1, xfailed=3)
    assert result.ret == 0
    assert gated("killed", LEDGER).ret == 3


@pytest.mark.parametrize(
    ("ledger", "told"),
    [("schema = 2\n", "not a kbitcheck ledger"), (LEDGER + "[options]\nrank = 8\n", "was accepted with --rank 8")],
)
def test_a_wrong_ledger_is_one_line(gated: Run, ledger: str, told: str) -> None:
    result = gated("rude", ledger)
    assert (result.ret, told in result.stderr.str()) == (4, True)


def test_a_missing_ledger_is_one_line(run: Run) -> None:
    result = run("--kbit-impl=good.py:prepare", "--kbit-ledger=absent.toml")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*no ledger*absent.toml*"])
    assert run("--kbit-ledger=absent.toml").ret == 4
