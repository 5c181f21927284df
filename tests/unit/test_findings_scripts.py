"""The scripts in ``docs/findings`` still show what they say, without ``kbitcheck``."""

from __future__ import annotations

import ast
import runpy
import warnings
from pathlib import Path

import pytest
import transformers

SCRIPTS = sorted((Path(__file__).parents[2] / "docs" / "findings").glob("*.py"))

# What transformers 4 does not do: there the scripts must say that the finding is gone.
SINCE_TRANSFORMERS_5 = {"experts_unquantized", "peft_deprecated_call", "peft_two_hooks", "prequantized_cannot_be_saved"}


def packages(script: Path) -> set[str]:
    """The packages that a script imports."""
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {str(name).partition(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_finding_is_there(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in packages(script):
        pytest.importorskip(name, reason=f"{name} is not installed")
    gone = script.stem in SINCE_TRANSFORMERS_5 and transformers.__version__ < "5"
    with warnings.catch_warnings(action="ignore"), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == int(gone), printed
    assert printed.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_stands_alone(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 30
    assert packages(script) <= {
        "bitsandbytes", "optimum", "peft", "subprocess", "sys", "tempfile", "torch", "torchao", "transformers", "warnings", "weakref",
    }  # fmt: skip
