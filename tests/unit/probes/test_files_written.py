"""What Python code writes is seen, but for temporary files, caches and what is gone again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kbitcheck.observe.probes import files_written


def written(folder: Path) -> set[str]:
    return {Path(path).name for path in files_written.written() if folder in Path(path).parents}


def test_what_is_written_and_still_there_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files_written.watch()
    assert written(tmp_path) == set()
    monkeypatch.chdir(tmp_path)
    Path("opened").write_text("x")
    os.close(os.open(tmp_path / "created", os.O_CREAT | os.O_WRONLY))
    Path("folder").mkdir()
    Path("opened").rename("renamed")
    Path("read").touch()
    Path("read").unlink()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "kept").write_text("x")
    assert written(tmp_path) == {"created", "folder", "renamed"}
    Path("renamed").read_text()
    Path("folder").rmdir()
    assert written(tmp_path) == {"created", "renamed"}


def test_temporary_files_and_what_lies_in_temporary_folders_are_not(tmp_path: Path) -> None:
    files_written.watch()
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder, tempfile.TemporaryFile(dir=tmp_path):
        (Path(folder) / "inside").write_text("x")
        with tempfile.NamedTemporaryFile(dir=tmp_path):
            assert written(tmp_path) == set()


def test_processes_and_connections_are_counted() -> None:
    files_written.watch()
    before = files_written.reached()
    subprocess.run([sys.executable, "--version"], capture_output=True, check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"", ("127.0.0.1", 9))
    after = files_written.reached()
    assert [name for name in after if after[name] > before.get(name, 0)] == ["a message", "a process"]


def test_a_callers_process_is_not_watched() -> None:
    """Such a hook stays to the end of the process, and ``id`` takes longer with it."""
    script = """
import sys, kbitcheck
hooks = []
sys.addaudithook = hooks.append
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.backends.quantization import Quantization
report = kbitcheck.audit(resolve("tiny:llama").load(Quantization()), select=["KB101", "KB513"])
assert report.exit_code == 0, str(report)
assert not hooks
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
