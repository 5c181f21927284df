"""What the README says of the command line, the rules, the findings and the cost is what there is."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kbitcheck.core.rule import rules
from kbitcheck.run.runner import findings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rules_table() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "rules_table.py"))


def test_the_table_of_rules_is_the_registry(rules_table: dict[str, Any]) -> None:
    assert rules_table["filled"](README) == README, "run `python docs/rules_table.py`"
    for code in rules():
        assert README.count(f"\n| {code} | ") == 1


def test_check_tells_a_drift(tmp_path: Path, rules_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "README.md"
    stale.write_text(README.replace("| KB101 | base-frozen |", "| KB101 | base-thawed |"), encoding="utf-8")
    main = rules_table["main"]
    monkeypatch.setitem(main.__globals__, "README", stale)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    assert stale.read_text(encoding="utf-8") == README


def test_the_help_is_what_the_command_prints() -> None:
    shown = re.search(r"\$ kbitcheck --help\n(.*?)\n```", README, re.DOTALL)
    assert shown is not None
    printed = subprocess.run([sys.executable, "-m", "kbitcheck", "--help"], capture_output=True, text=True, check=True)
    assert shown[1] == printed.stdout.rstrip()


def test_every_script_of_a_finding_is_in_the_table() -> None:
    linked = set(re.findall(r"\((docs/findings/\w+\.py)\)", README))
    assert linked == {f"docs/findings/{path.name}" for path in (ROOT / "docs" / "findings").glob("*.py")}
    for (code, _), why in findings().items():
        script = why.rpartition("(")[2].removesuffix(")")
        assert re.search(rf"\|[^|]*{code}[^|]*\| \[`[^|]*\({re.escape(script)}\) \|", README), code


def test_every_rule_that_is_named_exists_or_is_said_to_be_missing() -> None:
    missing = README.partition("## What is not verified")[2]
    assert set(re.findall(r"KB\d{3}", README)) - set(rules()) == set(re.findall(r"KB\d{3}", missing)) - set(rules())


def test_the_cost_is_what_was_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    for row in results["ratios"]:
        met = "yes" if row["met"] else "**no**"
        assert f"| {row['what']} | {row['to']} | {row['ratio']:.2f} | {row['target']:g} | {met} |" in README


def test_the_project_speaks_of_itself_alone() -> None:
    data = [path for kind in ("py", "json", "toml") for path in (ROOT / "docs").rglob(f"*.{kind}")]
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *data):
        assert not re.search(r"/work/|/tmp/|/home/|\bsession\b", path.read_text(encoding="utf-8")), path
