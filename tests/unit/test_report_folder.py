"""A folder of reports: one file for each title, whatever characters the title has."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.report.report_folder import ReportFolder, file_name

REPORT = Report(tool="t", environment={}, subject={}, results=(), blame="own")


@pytest.mark.parametrize(
    ("title", "name"),
    [("PEFT 0.21.2", "peft-0.21.2"), ("a/b::c:d", "a-b-c-d"), ("../..", "report"), ("trl==1.16.0", "trl==1.16.0")],
)
def test_a_title_becomes_a_name_that_every_system_takes(title: str, name: str) -> None:
    assert file_name(title) == name


def test_a_later_report_replaces_an_earlier_one(tmp_path: Path) -> None:
    folder = ReportFolder(str(tmp_path / "new" / "reports"), ["PEFT 1", "PEFT 2"])
    folder.write("PEFT 1", REPORT)
    folder.write("PEFT 1", REPORT)
    assert [path.name for path in (tmp_path / "new" / "reports").iterdir()] == ["peft-1.json"]


def test_without_a_name_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ReportFolder("", ["one", "One"]).write("one", REPORT)
    assert not list(tmp_path.iterdir())


def test_two_titles_with_one_file_are_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'fork a' and 'Fork A' would be one file"):
        ReportFolder(str(tmp_path), ["fork a", "Fork A"])
