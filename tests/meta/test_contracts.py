"""The import contracts of ``pyproject.toml`` hold, and each fails on a wrong import."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kbitcheck

pytest.importorskip("importlinter")

ROOT = Path(kbitcheck.__file__).parents[1]


def lint(tree: Path) -> dict[str, bool]:
    """Whether each contract holds in a tree, by the contract's name."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    lines = subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout.splitlines()
    verdicts = [line.partition(" (")[0].rpartition(" ") for line in lines]
    return {name: verdict == "KEPT" for name, _, verdict in verdicts if verdict in ("KEPT", "BROKEN")}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("contracts")
    shutil.copy(ROOT / "pyproject.toml", tree)
    only_python = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kbitcheck", tree / "kbitcheck", ignore=only_python)
    shutil.copytree(ROOT / "reference" / "kbitcheck_reference", tree / "kbitcheck_reference", ignore=only_python)
    return tree


def test_the_contracts_hold(copied: Path) -> None:
    verdicts = lint(copied)
    assert len(verdicts) == 7
    assert all(verdicts.values()), verdicts


@pytest.mark.parametrize(
    ("file", "statement", "contract"),
    [
        ("kbitcheck/core/errors.py", "import kbitcheck.run.runner", "Imports point downwards"),
        ("kbitcheck/compare/diff.py", "import kbitcheck.cli.options", "Imports point downwards"),
        ("kbitcheck/judge/cost.py", "import kbitcheck.observe.case", "What judges, compares and reports knows plain data alone"),
        ("kbitcheck/report/html.py", "import kbitcheck.judge.cost", "Reports and faults know no rules"),
        ("kbitcheck/judge/cost.py", "import torch", "No torch where facts are judged and shown, and in the doors"),
        ("kbitcheck/cli/app.py", "import kbitcheck.observe.case", "The doors run cases through run"),
        ("kbitcheck_reference/lora.py", "import kbitcheck.core.errors", "The reference imports nothing of kbitcheck"),
        ("kbitcheck/core/errors.py", "import kbitcheck.core.report", "No import cycles"),
    ],
    ids=lambda text: text,
)  # fmt: skip
def test_a_wrong_import_breaks_its_contract(copied: Path, file: str, statement: str, contract: str) -> None:
    path = copied / file
    source = path.read_text(encoding="utf-8")
    path.write_text(f"{source}\n\ndef wrong():\n    {statement}\n", encoding="utf-8")
    try:
        assert lint(copied)[contract] is False
    finally:
        path.write_text(source, encoding="utf-8")
