"""What does not need torch does not import it, and is quick to start."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kbitcheck.cli.app import COMMANDS
from kbitcheck.core.report import EXIT_NOTHING

HEAVY = ("torch", "transformers", "numpy", "bitsandbytes", "peft")

PROBE = """
import sys
sys.stdout = sys.stderr
for arguments in {lines!r}:
    sys.argv = ["kbitcheck", *arguments]
    try:
        {statement}
    except SystemExit as end:
        assert end.code in (None, {code}), end.code
    heavy = [name for name in {heavy!r} if name in sys.modules]
    if heavy:
        sys.__stdout__.write(" ".join([*arguments, *heavy]))
        break
"""


def imported(statement: str, *lines: tuple[str, ...], heavy: tuple[str, ...] = HEAVY, code: int = 0) -> str:
    """Which of the heavy packages a process has imported after a statement, run with the arguments of each line in turn.

    With those goes the first line after which it has. Each line ends with the exit code.
    """
    script = PROBE.format(lines=lines or ((),), statement=statement, heavy=heavy, code=code)
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout


MAIN = "from kbitcheck.cli.main import main; main()"
HELP = [(command, "--help") for command in COMMANDS]


def test_light_commands_import_nothing_heavy() -> None:
    assert imported(MAIN, ("--help",), ("--version",), *HELP, ("rules",), ("rules", "KB101")) == ""
    assert imported(MAIN, ("config",), ("env",), ("completion", "bash"), ("completion", "--words", "models")) == ""


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


def test_watch_imports_no_rule_no_fact_and_no_backend_for_a_script_without_a_quantized_model() -> None:
    own = tuple(f"kbitcheck.{name}" for name in ("backends", "core.events", "core.facts", "judge", "models", "observe"))
    line = ("watch", "--", sys.executable, "-c", "pass")
    statement = (
        "import sys; from kbitcheck.cli.main import run; sys.exit(run(sys.argv[1:]))"  # main leaves no process to ask
    )
    assert imported(statement, line, heavy=(*HEAVY, "tempfile", *own), code=EXIT_NOTHING) == ""


def processor_seconds(*command: str) -> float:
    """What a command takes of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [("--help",), ("completion", "--words", "models")], ids=" ".join)
def test_help_and_completion_take_less_than_ten_times_an_empty_program(arguments: tuple[str, ...]) -> None:
    """The promise of the front door. Other work on the machine slows both, so that they take turns and the least of each counts."""
    own, empty = [], []
    for _ in range(5):
        own.append(processor_seconds(sys.executable, "-m", "kbitcheck", *arguments))
        empty.append(processor_seconds(sys.executable, "-c", "pass"))
    assert min(own) < 10 * min(empty)


def test_the_probe_sees_what_is_heavy() -> None:
    assert imported("import numpy") == "numpy"
