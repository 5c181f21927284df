"""One run of the command on the real stack, and the bar that a terminal sees."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kbitcheck.cli.app import run
from kbitcheck.core.report import Report
from kbitcheck.core.result import Party, Status
from kbitcheck.report.parts.charts import charts
from tests.cli.conftest import Door


def test_the_command_audits_a_real_quantized_model(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    codes = ("KB101", "KB201", "KB304", "KB405", "KB501")
    arguments = ["model", "tiny:llama", "--prepare", "reference", "--quant", "nf4", "--select", ",".join(codes)]
    ran = subprocess.run(
        [sys.executable, "-m", "kbitcheck", *arguments, "--format", "json", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = Report.from_json(json.loads(ran.stdout))
    assert [(r.rule, r.status) for r in report] == [(c, Status.PASS) for c in codes]
    assert all(r.examined for r in report)
    assert report.environment["torch"].startswith("2.")
    assert report.environment["cpu_capability"]
    assert report.facts["cases"]["tiny:llama-nf4-default"]["model_class"] == "LlamaForCausalLM"
    assert [c.title for c in charts(report)] == [
        "Gradient error by block",
        "Where the bytes are",
        "Activation bytes by block",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["scratch"]
    assert not list(scratch.iterdir())


FORK = """
import bitsandbytes.autograd._functions as functions
from kbitcheck_reference import prepare_model_for_kbit_training as prepare

whole = functions.MatMul4Bit.backward


def backward(ctx, gradient):
    first, *rest = whole(ctx, gradient)
    return (first if first is None else 1.1 * first), *rest


functions.MatMul4Bit.backward = staticmethod(backward)
"""


@pytest.mark.usefixtures("forked_workers")
def test_what_an_import_breaks_in_the_libraries_is_not_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each base in the process is broken alike, and so is no witness."""
    (tmp_path / "fork.py").write_text(FORK)
    monkeypatch.chdir(tmp_path)
    asked = ["--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off", "--select", "KB303"]
    assert run(["impl", "fork.py:prepare", *asked, "--format", "json", "--device", "cpu"]) == 1
    (result,) = Report.from_json(json.loads(capfd.readouterr().out))
    assert {failure.party for failure in result.failures} == {Party.IMPLEMENTATION}


def test_a_terminal_sees_a_bar_and_the_report_none_of_it(door: Door) -> None:
    (door.cwd / "slow.py").write_text("import time\ndef prepare(model):\n    time.sleep(1)\n    return model\n")
    main, side = pty.openpty()
    arguments = ("impl", "slow.py:prepare", "--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off")
    process = subprocess.Popen(
        [sys.executable, "-m", "kbitcheck", *arguments],
        cwd=door.cwd,
        env={**door.environment(), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=side,
    )
    os.close(side)
    seen = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            chunk = os.read(main, 4096)
        except OSError:  # how Linux says that the other side has closed
            break
        if not chunk:
            break
        seen += chunk
    out, _ = process.communicate(timeout=30)
    os.close(main)
    assert process.returncode == 0
    assert b"2/5" in seen
    assert b"tiny:llama-nf4-off" in seen
    assert b"\x1b" not in out
