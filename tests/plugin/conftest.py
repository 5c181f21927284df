"""Runs pytest with the plugin in a process of its own, on the stubs of ``tests/cli/stub_stack``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import STUB_STACK
from tests.fork_server import ForkServer

INSTALLED = any(entry.value == "kbitcheck.pytest_plugin" for entry in metadata.entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "kbitcheck.pytest_plugin")  # twice would be an error
# Rewriting assertions, pytest would find kbitcheck's own modules before the stubs. The others' plugins import much.
ALONE = ("--assert=plain", "-p", "no:hypothesispytest", "-p", "no:anyio", "--basetemp=basetemp")

ONE = ("--kbit-model=tiny:llama", "--kbit-quant=nf4", "--kbit-checkpointing=off")
TWO = ("--kbit-model=tiny:llama", "--kbit-model=tiny:gpt2", "--kbit-quant=nf4", "--kbit-checkpointing=off")

# Each call of the subject is a line: with rules that share one fact, a line is a case that was built.
SUBJECTS = {
    "good": "def prepare(model):\n    open('calls', 'a').write('.')\n    return model\nprepare.please = True\n",
    "rude": "def prepare(model):\n    return model\n",
    "nothing": "def prepare(model):\n    pass\n",
    # Breaks a MUST (KB103), and makes another rule (KB201) raise.
    "half_judged": "class Prepare:\n    def __call__(self, model):\n        return None\n"
    "    @property\n    def please(self):\n        raise MemoryError('deaf')\nprepare = Prepare()\n",
    "leaves": "import os\ndef prepare(model):\n    os._exit(7)\n",
    "killed": "import os\ndef prepare(model):\n    os.kill(os.getpid(), 9)\n",
    "import_error": "import no_such_module_anywhere\n",
}

# Workers of pytest's own take ten times as long to start as what they do here: some tests have them, of the others the slow form.
ALONE_OR_SPREAD = pytest.mark.parametrize("workers", ["-n0", pytest.param("-n1", marks=pytest.mark.slow)])

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def subjects(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with implementations, where the stubs take the place of torch."""
    for name, source in SUBJECTS.items():
        (pytester.path / f"{name}.py").write_text(source)
    scratch = pytester.path.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("COLUMNS", "200")
    path = filter(None, [str(STUB_STACK), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    for name in [n for n in os.environ if n.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    return pytester.path


@pytest.fixture
def run(subjects: Path, stubbed: ForkServer) -> Run:
    def pytest_with(*arguments: str) -> pytest.RunResult:
        path = os.pathsep.join([str(subjects), os.environ["PYTHONPATH"]])
        ran = stubbed.run(
            "pytest", *ALONE, *PLUGIN, *arguments, cwd=subjects, environment={**os.environ, "PYTHONPATH": path}
        )
        print(ran.stdout, ran.stderr)
        result = pytest.RunResult(ran.returncode, ran.stdout.splitlines(), ran.stderr.splitlines(), 0.0)
        left = [p for p in subjects.parent.joinpath("scratch").iterdir() if p.name.startswith("kbitcheck-")]
        assert left == []
        return result

    return pytest_with


def builds(folder: Path) -> int:
    """How many cases were built since the last look."""
    calls = folder / "calls"
    count = len(calls.read_text()) if calls.exists() else 0
    calls.unlink(missing_ok=True)
    return count


def untimed(path: Path) -> dict[str, Any]:
    """A report without its timings."""
    report: dict[str, Any] = json.loads(path.read_text())
    del report["facts"]["seconds"]
    for result in report["results"]:
        result.pop("seconds", None)
    return report
