"""What is raised anywhere leaves the process as one line and a code; a file is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbitcheck.cli import main
from kbitcheck.core.errors import UsageError
from kbitcheck.report.output_file import OutputFile


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UsageError("two\nlines"), 4, "kbitcheck: two lines\n"),
        (KeyboardInterrupt(), 2, "kbitcheck: interrupted\n"),
        (
            ZeroDivisionError("by zero"),
            3,
            "kbitcheck: internal error: ZeroDivisionError: by zero (--debug shows where)\n",
        ),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("debug", [False, True])
def test_whatever_is_raised_is_one_line(
    raised: BaseException,
    code: int,
    told: str,
    debug: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def app(arguments: object) -> int:
        raise raised

    monkeypatch.setattr("kbitcheck.cli.app.run", app)
    assert main.run(["model", *["--debug"] * debug]) == code
    err = capfd.readouterr().err
    assert err.endswith(told)
    assert (err != told) == (debug and code in (3, 4))


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.txt"
    target.write_text("old")
    output = OutputFile(str(target))

    def full(self: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match="No space left"):
        output.write("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.txt", "old")]
