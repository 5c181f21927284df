"""Shared by all tests: no network, one thread, no compiler, no time limits, GPU tests only where there is a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from kbitcheck.cli.app import COMMANDS
from tests import forked_worker
from tests.fork_server import ForkServer

STUB_STACK = Path(__file__).parent / "cli" / "stub_stack"

os.environ["HF_HUB_OFFLINE"] = "1"
# Where bytecode is not kept, each of the hundreds of processes that tests start compiles kbitcheck anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# As kbitcheck's own worker: on tiny models threads wait for each other, and compiling takes longer than running.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# Two shared cores are slow now and then.
settings.register_profile("kbitcheck", deadline=None, max_examples=50)
settings.load_profile("kbitcheck")


@pytest.fixture(scope="session")
def bases() -> dict[Any, Any]:
    """Bases by model and quantization, shared by the cases of a test process."""
    return {}


@pytest.fixture(scope="session")
def stubbed() -> Iterator[ForkServer]:
    """Runs the command, or pytest with the plugin, on the stubs of ``cli/stub_stack``."""
    path = os.pathsep.join(filter(None, [str(STUB_STACK), os.environ.get("PYTHONPATH", "")]))
    commands = [f"kbitcheck.cli.commands.{name}" for name in COMMANDS]
    server = ForkServer(
        {**os.environ, "PYTHONPATH": path}, [*commands, "pytest", "xdist.dsession", "kbitcheck.pytest_plugin"]
    )
    yield server
    server.close()


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that this process starts are forks of it: importing the real stack takes longer than what they do."""
    from kbitcheck.run import worker, worker_process  # noqa: F401

    monkeypatch.setattr(worker_process, "subprocess", forked_worker.forking())


def pytest_collection_finish() -> None:
    """Collections of all that is alive come ten times more seldom. Frozen it must not be: kbitcheck freezes it while it measures."""
    gc.set_threshold(700, 10, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("transformers5"):
            if version("transformers") < "5":
                item.add_marker(pytest.mark.skip(reason=f"transformers 4: {mark.args[0]}"))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
