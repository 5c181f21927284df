"""Runs the command in a process of its own, on the stubs of ``stub_stack``, and sees what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import STUB_STACK
from tests.fork_server import ForkServer

SUBJECTS = {
    "good": "def prepare(model):\n    return model\nprepare.please = True\n",
    "rude": "def prepare(model):\n    return model\n",
    "nothing": "def prepare(model):\n    print('chatter')\n",
    # Breaks a MUST (KB103), and leaves no memory for another rule (KB201).
    "half_judged": "class Prepare:\n    def __call__(self, model):\n        return None\n"
    "    @property\n    def please(self):\n        raise MemoryError('deaf')\nprepare = Prepare()\n",
    "deaf": "class Prepare:\n    def __call__(self, model):\n        return model\n"
    "    @property\n    def please(self):\n        raise ValueError('deaf')\nprepare = Prepare()\n",
    "raises": "def prepare(model):\n    raise ValueError('no\\nnot at all')\n",
    "leaves": "import os\ndef prepare(model):\n    print('last words')\n    os._exit(7)\n",
    "exits": "def prepare(model):\n    raise SystemExit('bye')\n",
    "killed": "import os, signal\ndef prepare(model):\n    os.kill(os.getpid(), signal.SIGKILL)\n",
    "crashes": "import ctypes\ndef prepare(model):\n    ctypes.string_at(0)\n",
    "hungry": "def prepare(model):\n    raise MemoryError('not enough')\n",
    "hangs": "import time\ndef prepare(model):\n    time.sleep(600)\n",
    "import_error": "import no_such_module_anywhere\n",
    "import_hangs": "import time\ntime.sleep(600)\n",
    "import_dies": "import os\nos._exit(3)\n",
    "not_callable": "prepare = 3\n",
    "garbles": "import os\ndef prepare(model):\n    [os.write(f, b'junk\\n') for f in range(3, 64) if _writes(f)]\n"
    "def _writes(f):\n    try:\n        os.write(f, b'')\n    except OSError:\n        return False\n    return True\n",
    "forks": "import os, time\ndef prepare(model):\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(5)\n",
    "litters": "import tempfile, helper\ndef prepare(model):\n    tempfile.mkdtemp(); tempfile.mkstemp()\n"
    "    return helper.same(model)\n",
}


@dataclass(frozen=True)
class Door:
    """``cwd`` is where commands run and subjects live; ``scratch`` is their TMPDIR; ``stubbed`` runs them on the stubs."""

    cwd: Path
    scratch: Path
    stubbed: ForkServer

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(STUB_STACK), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(self.scratch), "COLUMNS": "200"}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kbitcheck", *arguments],
            cwd=self.cwd,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.stubbed.run("kbitcheck", *arguments, cwd=self.cwd, environment=self.environment())

    def left(self) -> list[str]:
        """What was left in the temporary and the working directory, less the subjects themselves."""
        given = {f"{name}.py" for name in (*SUBJECTS, "helper")}
        return [str(p) for root in (self.cwd, self.scratch) for p in root.rglob("*") if p.name not in given]


@pytest.fixture
def door(tmp_path: Path, stubbed: ForkServer) -> Door:
    cwd, scratch = tmp_path / "cwd", tmp_path / "scratch"
    cwd.mkdir()
    scratch.mkdir()
    for name, source in SUBJECTS.items():
        (cwd / f"{name}.py").write_text(source)
    (cwd / "helper.py").write_text("def same(model):\n    return model\n")
    return Door(cwd, scratch, stubbed)


Run = Callable[..., subprocess.CompletedProcess[str]]


def heed() -> None:
    """Undo what a shell does to background jobs: they ignore SIGINT, and hand that on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
