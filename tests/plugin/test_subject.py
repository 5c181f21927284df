"""A subject in an environment of its own, as pytest's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.test_subjects import BAD, wheel
from tests.plugin.conftest import ONE, Run

pytest_plugins = ["pytester"]


@pytest.fixture
def name(pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A subject that breaks one rule; a good one of that name, which pytest would import, must not take its place."""
    for variable, value in (
        ("PIP_NO_INDEX", "1"), ("PIP_CONFIG_FILE", os.devnull), ("PATH", str(tmp_path)),
        ("KBITCHECK_CACHE", str(tmp_path / "cache")),
    ):  # fmt: skip
        monkeypatch.setenv(variable, value)
    (pytester.path / "fork_prep.py").write_text("def prepare(model):\n    return model\n")
    (pytester.path / "test_nothing.py").write_text("import fork_prep\n")
    return f"{wheel(tmp_path / 'w', BAD)}::fork_prep:prepare"


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "parallel"])
def test_it_is_built_and_judged(run: Run, name: str, workers: tuple[str, ...]) -> None:
    result = run(f"--kbit-impl={name}", *ONE, *workers)
    result.assert_outcomes(passed=2, skipped=1, failed=1, xfailed=1)
    assert "KB103 returns" in result.stdout.str()


def test_one_that_cannot_be_had_ends_the_session(run: Run, name: str) -> None:
    result = run(f"--kbit-impl={name}_not", *ONE)
    assert result.ret == 4
    assert "has no attribute 'prepare_not'" in result.stdout.str() + result.stderr.str()


def test_collecting_builds_nothing(run: Run, name: str, tmp_path: Path) -> None:
    assert run(f"--kbit-impl={name}", *ONE, "--collect-only", "-q").ret == 0
    assert not (tmp_path / "cache").exists()
