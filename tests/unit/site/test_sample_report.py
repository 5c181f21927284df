"""The saved report that the docs show, and the picture of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from kbitcheck.core.rule import rules
from kbitcheck.report import render
from tests.scripts import DOCS


def test_the_saved_report_is_of_todays_rules_and_shown_where_it_is_asked_for(site: dict[str, ModuleType]) -> None:
    sample, shown = site["other_pages"].sample(), site["other_pages"].SHOWN
    assert {r.rule for r in sample} <= set(rules())
    assert sample.exit_code == 1
    assert "✗ KB201 norms-fp32" in site["other_pages"].filled(shown)
    assert len(render(sample, "html")) > 10_000
    assert [page.name for page in DOCS.glob("*.md") if shown in page.read_text(encoding="utf-8")] == ["report.md"]
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    (spec,) = sample.subject["cases"].values()
    for word in (spec["implementation"], spec["model"], spec["quant"], spec["checkpointing"]):
        assert word in re.findall(r"^\$ kbitcheck .*", text, re.MULTILINE)[0]


def test_the_picture_is_of_the_saved_report(
    site: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = site["picture"]
    assert picture.main(["--check"]) == 0, "run `python docs/site/picture.py`"
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "images" / "report.svg")
    assert picture.main([]) == 0
    text = picture.PICTURE.read_text(encoding="utf-8")
    assert "KB201" in text
    assert not re.search(r"@import|url\((?!#)|href=", text)
    picture.PICTURE.write_text(text.replace("KB201", "KB202"), encoding="utf-8")
    assert picture.main(["--check"]) == 1
    assert "has drifted" in capsys.readouterr().err
