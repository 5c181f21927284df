"""Several workers at once: the report is the one of a single worker, and whatever ends the run ends them all."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest

from tests.cli.conftest import Door, heed
from tests.cli.test_interrupt import _workers

MODELS = ("--model", "tiny:llama", "--model", "tiny:gpt2", "--checkpointing", "off")


def _told(text: str) -> dict[str, Any]:
    """A report without its timings."""
    report = json.loads(text)
    report["facts"].pop("seconds")
    for result in report["results"]:
        result.pop("seconds", None)
    return dict(report)


@pytest.mark.parametrize("subject", ["good", "rude", "leaves"])
def test_the_report_does_not_depend_on_the_number_of_workers(door: Door, subject: str) -> None:
    runs = [door("impl", f"{subject}.py:prepare", *MODELS, "--format", "json", "--jobs", n) for n in ("1", "3")]
    one, three = (_told(run.stdout) for run in runs)
    assert len({result["case"] for result in one["results"]}) == 4
    assert one == three
    assert runs[0].returncode == runs[1].returncode
    assert runs[0].stderr == runs[1].stderr
    assert door.left() == []


def test_wrong_usage_in_one_worker_ends_all(door: Door) -> None:
    run = door("impl", "import_error.py:prepare", *MODELS, "--jobs", "2")
    assert run.returncode == 4
    assert run.stderr.count("\n") == 1
    assert _workers(door.scratch) == []
    assert door.left() == []


def test_an_interrupt_ends_every_worker(door: Door) -> None:
    source = "import os, time\ndef prepare(model):\n    open(f'here{os.getpid()}', 'w').close()\n    time.sleep(600)\n"
    (door.cwd / "hangs.py").write_text(source)
    with door.start("impl", "hangs.py:prepare", *MODELS, "--jobs", "2", "--format", "json", preexec_fn=heed) as process:
        deadline = time.monotonic() + 60
        while len(list(door.cwd.glob("here*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(_workers(door.scratch)) == 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert json.loads(out)["complete"] is False
    assert err.startswith("✗ interrupted")
    assert _workers(door.scratch) == []
    assert list(door.scratch.iterdir()) == []
