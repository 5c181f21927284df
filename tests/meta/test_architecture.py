"""The arrows between the parts, and the registry's form."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import kbitcheck_reference
import pytest

import kbitcheck
from kbitcheck.core.result import Level
from kbitcheck.core.rule import rules

PACKAGE = Path(kbitcheck.__file__).parent
HEAVY = {"torch", "transformers", "numpy", "bitsandbytes", "peft", "safetensors"}
TORCH_FREE = [
    "core",
    "judge",
    "report",
    "compare",
    "cli",
    "pytest_plugin",
    "run",
    "strategies.py",
    "testing.py",
    "__init__.py",
]


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def files(part: str) -> list[Path]:
    path = PACKAGE / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("part", TORCH_FREE)
def test_the_judging_side_is_free_of_torch(part):
    assert {str(f): imported(f) & HEAVY for f in files(part) if imported(f) & HEAVY} == {}


@pytest.mark.parametrize("part", ["compare"])
def test_the_gate_knows_no_command_line(part):
    for path in files(part):
        assert not re.findall(
            r"^\s*(?:from|import) (?:typer|kbitcheck\.cli)\b", path.read_text(encoding="utf-8"), re.MULTILINE
        )


def test_a_torch_import_would_be_seen(tmp_path):
    (tmp_path / "rule.py").write_text("import torch\n")
    assert imported(tmp_path / "rule.py") & HEAVY == {"torch"}


def test_the_oracle_imports_nothing_of_the_checker():
    oracle = Path(kbitcheck_reference.__file__).parent
    for path in oracle.rglob("*.py"):
        names = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not [n for n in names if n == "kbitcheck" or n.startswith("kbitcheck.")], path


def test_loading_every_rule_imports_no_torch():
    code = "import sys, kbitcheck.core.rule as c; assert len(c.rules()) > 50; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("rule", rules().values(), ids=lambda r: r.code)
def test_each_rule_has_a_whole_page(rule):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name)
    assert isinstance(rule.level, Level)
    assert rule.requirement.endswith(".")
    for heading in ("Why", "Symptom", "Fix", "Sources"):
        assert len(rule.section(heading)) > 10, heading


def test_names_are_distinct():
    names = [rule.name for rule in rules().values()]
    assert len(names) == len(set(names))


def test_every_finding_has_its_script():
    from kbitcheck.run.runner import findings

    for why in findings().values():
        script = re.search(r"\((docs/findings/\w+\.py)\)", why)
        assert script is not None
        assert (PACKAGE.parent / script[1]).is_file(), script[1]
