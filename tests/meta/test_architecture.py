"""The form of the registry of rules."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kbitcheck
from kbitcheck.core.result import Level
from kbitcheck.core.rule import rules

PACKAGE = Path(kbitcheck.__file__).parent


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
    from kbitcheck.judge.conditions import findings

    for finding in findings():
        assert (PACKAGE.parent / finding.script).is_file(), finding.script


def test_pytest_is_imported_by_its_plugin_alone():
    """An installation without pytest has the command and the functions."""
    doors = {"testing.py"}  # for test modules
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("pytest_plugin/") or name in doors:
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (kbitcheck\.pytest_plugin|pytest)\b", text, re.MULTILINE), name
