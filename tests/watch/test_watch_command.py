"""``kbitcheck watch -- COMMAND``: the command runs as it would, and its first steps are judged."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from tests.watch import runs

torch.manual_seed(5)
model, optimizer, options = getattr(runs, sys.argv[1])()
torch.manual_seed(6)
for loss in runs.loop(model, optimizer, **options):
    print("loss", loss.item())
if len(sys.argv) > 2:
    raise SystemExit(int(sys.argv[2]))
"""


def watch(*arguments, **options):
    words = [sys.executable, "-m", "kbitcheck", "watch", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_is_judged_and_its_output_is_as_without(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "dropout"])
    runpy.run_path(str(script))
    alone = capsys.readouterr().out
    report = tmp_path / "report.json"
    watched = watch("--format", "json", "--output", report, "--", sys.executable, script, "dropout")
    assert (watched.returncode, watched.stdout) == (0, alone)
    saved = json.loads(report.read_text())
    assert saved["subject"]["steps"] == 3
    judged = {r["rule"]: r["status"] for r in saved["results"]}
    assert judged["KB304"] == judged["KB714"] == "PASS"
    assert watched.stderr.splitlines()[-1].startswith("kbitcheck: ✓ trains as it should")


def test_a_command_that_fails_keeps_its_exit_code(script):
    # As transformers 5.6 does: first it asks whether bitsandbytes is there.
    # As Unsloth does: a layer is tried out before the model is loaded.
    tried = "next(m for m in runs.load().modules() if type(m).__name__ == 'Linear4bit').train()(torch.ones(1, 64))"
    script.write_text(
        "import importlib.util; importlib.util.find_spec('bitsandbytes')\n"
        + SCRIPT.replace("import runs\n", f"import runs\n{tried}\n")
    )
    watched = watch("--steps", "1", "--select", "KB714", "--", sys.executable, script, "labels_ignored", "7")
    assert watched.returncode == 7
    assert "KB714 labels-count" in watched.stderr


@pytest.mark.slow
def test_a_broken_run_has_the_reports_exit_code(script):
    watched = watch("--select", "KB714", "--", sys.executable, script, "labels_ignored")
    assert watched.returncode == 1
    assert "KB714 labels-count" in watched.stderr


def test_a_script_without_a_quantized_model_pays_nothing(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text("import sys; print(*sorted({*sys.modules} - {'sitecustomize', '__future__'}))")
    alone = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    watched = watch("--", sys.executable, script)
    assert (watched.returncode, watched.stdout) == (5, alone)
    assert "no quantized model took an optimizer step" in watched.stderr


@pytest.mark.parametrize(
    ("line", "waits"), [("import torch", False), ("import bitsandbytes", True), ("import torch, bitsandbytes", True)]
)
def test_the_watcher_waits_in_a_script_once_torch_and_the_quantizers_are_imported(line, waits):
    own = "('kbitcheck.run.watched_process' in sys.modules, any(m.startswith('kbitcheck.judge') for m in sys.modules))"
    watched = watch("--", sys.executable, "-c", f"import sys; {line}; print({own})")
    assert watched.stdout == f"{(waits, False)}\n"


def test_the_sitecustomize_that_is_there_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.customized = True")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    line = "import sys; print(customized, [p for p in sys.path if 'inject' in p])"
    watched = watch("--", sys.executable, "-c", line, env=environment)
    assert watched.stdout == "True []\n"


def test_signals_go_to_the_command(tmp_path):
    started = tmp_path / "started"
    line = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    words = [sys.executable, "-m", "kbitcheck", "watch", "--", sys.executable, "-c", line]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        while not started.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "arguments",
    [(), ("--",), ("--", "no-such-command"), ("--select", "KB999", "--", "true"), ("--steps", "0", "--", "true")],
)
def test_wrong_usage(arguments):
    watched = watch(*arguments)
    assert watched.returncode == 4
    assert len(watched.stderr.splitlines()) == 1


@pytest.mark.parametrize("named", ["there", "absent"])
def test_a_folder_for_reports_is_made_and_removed(named, tmp_path):
    (tmp_path / "there").mkdir()
    script = tmp_path / "look.py"
    script.write_text("import json, os\nprint(json.loads(os.environ['KBITCHECK_WATCH'])['folder'])")
    watched = watch("--", sys.executable, script, env={**os.environ, "TMPDIR": str(tmp_path / named)})
    folder = Path(watched.stdout.strip())
    assert folder.is_absolute()
    assert not folder.exists()
    assert (folder.parent == tmp_path / "there") == (named == "there")


def test_a_reader_that_has_gone_does_not_change_the_exit_code(tmp_path):
    words = [sys.executable, "-m", "kbitcheck", "watch", "--", sys.executable, "-c", "raise SystemExit(7)"]
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run(words, stdout=writing, stderr=writing, check=False).returncode == 7
    os.close(writing)
