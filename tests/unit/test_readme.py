"""What the README says is there, the findings are whole, and the cost is what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kbitcheck.core.rule import rules

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_a_minute_or_five() -> None:
    assert len(README.split()) <= 1200


def test_every_link_leads_to_a_file() -> None:
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert len(targets) > 10
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_architecture_names_what_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = [path for path in re.findall(r"`([\w/.]+)`", text) if "/" in path or path.endswith((".py", ".md", ".yml"))]
    assert len(paths) > 30
    for path in paths:
        places = (ROOT, ROOT / "kbitcheck", ROOT / "kbitcheck" / "observe")
        assert any((place / path).exists() for place in places), path


def test_every_rule_that_is_named_exists_or_is_said_to_be_missing() -> None:
    missing = README.partition("## Limits")[2]
    assert set(re.findall(r"KB\d{3}", README)) - set(rules()) == set(re.findall(r"KB\d{3}", missing)) - set(rules())
    assert re.findall(r"KB\d{3}", README)


def test_the_cost_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "results" / "bench.json").read_text(encoding="utf-8"))
    for row in results["ratios"]:
        met = "yes" if row["met"] else "**no**"
        assert f"| {row['what']} | {row['to']} | {row['ratio']:.2f} | {row['target']:g} | {met} |" in page


def test_the_project_speaks_of_itself_alone() -> None:
    data = [path for kind in ("py", "json", "toml") for path in (ROOT / "docs").rglob(f"*.{kind}")]
    for path in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *data):
        assert not re.search(r"/work/|/tmp/|/home/|\bsession\b", path.read_text(encoding="utf-8")), path
