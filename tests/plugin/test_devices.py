"""GPUs are counted without torch and dealt to xdist's workers by number."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kbitcheck.pytest_plugin import devices
from tests.plugin.conftest import TWO, Run

pytest_plugins = ["pytester"]

LISTED = "GPU 0: NVIDIA A (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (UUID: MIG-2)\nGPU 1: NVIDIA B (UUID: GPU-3)\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0,1", ["0", "1"]),
        (" 3 ", ["3"]),
        ("GPU-aa,GPU-bb", ["GPU-aa", "GPU-bb"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
    ],
)
def test_the_variable_says_what_is_visible(text: str, found: list[str]) -> None:
    assert devices.visible({"CUDA_VISIBLE_DEVICES": text}) == found


def test_the_driver_is_asked_where_there_is_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, LISTED)

    monkeypatch.setattr(subprocess, "run", listed)
    assert devices.visible({}) == ["0", "1"]


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert devices.visible({}) == []


@pytest.mark.parametrize(
    ("worker", "device", "seen"),
    [("gw0", "auto", "4"), ("gw1", "cuda", "7"), ("gw2", "auto", "4"), ("gw11", "auto", "7")],
)
def test_each_worker_takes_its_own(worker: str, device: str, seen: str) -> None:
    assert devices.environment_of(worker, device, ["4", "7"]) == {"CUDA_VISIBLE_DEVICES": seen}


@pytest.mark.parametrize(
    ("worker", "device", "known"),
    [("gw0", "cpu", ["0"]), ("gw0", "cuda:1", ["0", "1"]), ("gw0", "auto", []), ("", "auto", ["0"])],
)
def test_what_the_user_chose_is_left(worker: str, device: str, known: list[str]) -> None:
    assert devices.environment_of(worker, device, known) == {}


SEEN = "import os\ndef prepare(model):\n    open('seen', 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ')\n    return model\n"


@pytest.mark.parametrize(("workers", "alone"), [("-n2", True), ("-n0", False)])
def test_the_implementation_sees_its_workers_device(
    run: Run, subjects: Path, monkeypatch: pytest.MonkeyPatch, workers: str, alone: bool
) -> None:
    (subjects / "seen.py").write_text(SEEN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert run("--kbit-impl=seen.py:prepare", *TWO, workers).ret == 0
    seen = set((subjects / "seen").read_text().split())
    assert seen
    assert seen <= ({"4", "7"} if alone else {"4,7"})
