"""The pages of findings: each script has its entry, and each defect without a thread a report to file."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from kbitcheck.core.rule import rules
from tests.scripts import DOCS


def test_every_script_has_its_finding_and_every_record_its_script(
    site: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = site["other_pages"]
    page = others.findings()
    for script in (DOCS / "findings").glob("*.py"):
        assert page.count(f"{{ #{script.stem} }}") == 1
    for finding in others.committed_findings():
        for codes in others.excused_rules().get(finding.script, {}).values():
            assert all(code in finding.rules for code in codes)
    assert set(re.findall(r"KB\d{3}", page)) <= set(rules())
    assert "Not counted against the reference under [KB303](rules/KB303.md)." in page
    assert "Not counted against any implementation or model under [KB510](rules/KB510.md)." in page

    short = tmp_path / "findings.toml"
    text = others.FINDINGS.read_text(encoding="utf-8")
    short.write_text(text.replace('script = "peft_two_hooks"', 'script = "peft_three_hooks"'), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(others, "FINDINGS", short)
        with pytest.raises(ValueError, match="not every script"):
            others.findings()
    short.write_text('[[finding]]\nscript = "docs/findings/none.py"\nrule = "KB303"\n', encoding="utf-8")
    monkeypatch.setattr(others, "PACKAGE", tmp_path)
    with pytest.raises(ValueError, match="no script in docs/findings: none"):
        others.findings()


def test_every_finding_without_a_thread_has_a_report_to_file(site: dict[str, ModuleType]) -> None:
    upstream, findings = site["upstream"], site["other_pages"].committed_findings()
    committed = {path: path.read_text(encoding="utf-8") for path in (DOCS / "findings").glob("*.md")}
    assert committed == upstream.reports(), "run `python docs/site/upstream.py`"
    assert {path.stem for path in committed} == {f.script for f in findings if f.upstream == "none known"}
    fields = {path.stem: re.findall(r"^### (.+)$", text, re.MULTILINE) for path, text in committed.items()}
    assert fields["int_mm_one_column"] == ["🐛 Describe the bug", "Versions"]
    assert fields["bias_recast"] == ["System Info", "Reproduction", "Expected behavior"]
    for name, text in committed.items():
        assert (DOCS / "findings" / f"{name.stem}.py").read_text(encoding="utf-8").strip() in text
