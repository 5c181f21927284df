"""A run that is told to stop ends with 2, a partial report, and nothing left running or lying about."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kbitcheck.core.report import Report
from kbitcheck.run.worker_process import WorkerProcess
from tests.cli.conftest import Door, heed

ARGUMENTS = ("impl", "{}.py:prepare", "--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off")


def _workers(scratch: Path) -> list[int]:
    """Processes whose TMPDIR lies in the run's scratch directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"TMPDIR={scratch}/kbitcheck-".encode() in environment:
            found.append(int(entry.name))
    return found


def _eventually(condition: Callable[[], object], seconds: float = 30) -> bool:
    """Whether a condition comes true: a process that is just being started has no environment for a moment."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(met)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_an_interrupted_run_reports_what_it_has(door: Door, number: signal.Signals) -> None:
    (door.cwd / "hangs.py").write_text(
        # The parent reads the results there are, and then has time to take them in.
        "import fcntl, sys, termios, time\ndef prepare(model):\n"
        "    while any(fcntl.ioctl(int(sys.argv[2]), termios.FIONREAD, bytes(4))):\n        time.sleep(0.01)\n"
        "    time.sleep(0.5)\n    open('here', 'w').close()\n    time.sleep(600)\n"
    )
    arguments = (ARGUMENTS[0], "hangs.py:prepare", *ARGUMENTS[2:])
    with door.start(*arguments, "--format", "json", "--timeout", "60", preexec_fn=heed) as process:
        assert _eventually((door.cwd / "here").exists)
        assert _workers(door.scratch), "the worker was never seen: the check below would prove nothing"
        process.send_signal(number)
        for _ in range(40):  # impatient ones must not lose the report, whenever they come
            time.sleep(0.01)
            process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    report = Report.from_json(json.loads(out))
    assert not report.complete
    assert [r.rule for r in report] == ["KB101", "KB102"]
    assert err == "✗ interrupted: 1 kept, 1 not applicable\n"
    assert _workers(door.scratch) == []
    (door.cwd / "here").unlink()
    assert door.left() == []


def test_a_worker_does_not_outlive_a_killed_parent(door: Door) -> None:
    with door.start("impl", "hangs.py:prepare", *ARGUMENTS[2:]) as process:
        assert _eventually(lambda: _workers(door.scratch))
        process.kill()
    assert _eventually(lambda: not _workers(door.scratch))


def test_what_the_caller_ignores_stays_ignored(door: Door) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with door.start("impl", "good.py:prepare", *ARGUMENTS[2:], preexec_fn=ignore) as process:
        os.kill(process.pid, signal.SIGHUP)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_reader_that_leaves_is_no_error(door: Door) -> None:
    with door.start("impl", "nothing.py:prepare", *ARGUMENTS[2:]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(30) == 1
    assert err.count("\n") == 1


def test_a_worker_whose_close_was_interrupted_is_killed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(process: object, timeout: float | None = None) -> int:
        raise KeyboardInterrupt

    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    scratch = tmp_path / "kbitcheck-"
    scratch.mkdir()
    process = WorkerProcess(scratch, python=str(hangs))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.close()
    assert _eventually(lambda: _workers(tmp_path))
    try:
        process.close()
        assert _workers(tmp_path) == []
    finally:
        process.stop()
