"""What does not need torch does not import it, and is quick to start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kbitcheck.cli.app import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "bitsandbytes", "peft")

PROBE = """
import sys
sys.stdout = sys.stderr
for arguments in {lines!r}:
    sys.argv = ["kbitcheck", *arguments]
    try:
        {statement}
    except SystemExit as end:
        assert not end.code, end.code
    heavy = [name for name in {heavy!r} if name in sys.modules]
    if heavy:
        sys.__stdout__.write(" ".join([*arguments, *heavy]))
        break
"""


def imported(statement: str, *lines: tuple[str, ...]) -> str:
    """Which of the heavy packages a process has imported after a statement, run with the arguments of each line in turn.

    With those goes the first line after which it has.
    """
    script = PROBE.format(lines=lines or ((),), statement=statement, heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout


MAIN = "from kbitcheck.cli.main import main; main()"
HELP = [(command, "--help") for command in COMMANDS]


def test_light_commands_import_nothing_heavy() -> None:
    assert imported(MAIN, ("--help",), ("--version",), *HELP, ("rules",), ("rules", "KB101")) == ""


def test_show_and_the_api_import_nothing_heavy(tmp_path: Path) -> None:
    report = {"schema": 1, "tool": "kbitcheck", "environment": {}, "subject": {}, "blame": "own", "strict": False}
    (tmp_path / "report.json").write_text(json.dumps({**report, "complete": True, "facts": {}, "results": []}))
    assert imported(MAIN, ("show", str(tmp_path / "report.json"))) == ""
    assert imported("import kbitcheck.compare.gate, kbitcheck.compare.diff, kbitcheck.compare.accept") == ""
    assert (
        imported(
            "import kbitcheck, kbitcheck.extend, kbitcheck.testing, kbitcheck.run.runner, kbitcheck.run.in_process, kbitcheck.run.worker"
        )
        == ""
    )


def test_the_probe_sees_what_is_heavy() -> None:
    assert imported("import numpy") == "numpy"
