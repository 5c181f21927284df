"""The scripts in ``docs/findings`` still show what they say, without ``kbitcheck``."""

from __future__ import annotations

import ast
import runpy
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

SCRIPTS = sorted((Path(__file__).parents[2] / "docs" / "findings").glob("*.py"))

# What earlier releases do not do: there the scripts must say that the finding is gone.
SINCE = {
    "aqlm_t5_not_loaded": ("transformers", "5"),
    "experts_unquantized": ("transformers", "5"),
    "fp8_partial_blocks": ("transformers", "5"),  # before, no FP8 checkpoint is loaded without a GPU
    "fp8_unpacked_on_load": ("transformers", "5"),
    "hqq_not_loaded": ("transformers", "5"),
    "peft_adalora_ranknum": ("peft", "0.21.1"),
    "peft_deprecated_call": ("transformers", "5"),
    "peft_parametrized_experts": ("peft", "0.19"),
    "peft_two_hooks": ("transformers", "5"),
    "prequantized_cannot_be_saved": ("transformers", "5"),
}


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
    library, since = SINCE.get(script.stem, ("torch", "0"))
    gone = Version(version(library)) < Version(since)
    with warnings.catch_warnings(action="ignore"), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == int(gone), printed
    assert printed.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_stands_alone(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 30
    assert packages(script) <= {
        "accelerate", "aqlm", "bitsandbytes", "compressed_tensors", "copy", "gptqmodel", "hqq", "optimum", "peft", "subprocess", "sys",
        "tempfile", "torch", "torchao", "transformers", "warnings", "weakref",
    }  # fmt: skip
