"""Runs modules as ``python -m`` does, in forks of one process that has imported what they import.

On the stubs a command's imports take ten times as long as the command. Its workers are forks, too.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


class ForkServer:
    """A process with some modules imported under an environment, which runs one module at a time."""

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *modules],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, module: str, *arguments: str, cwd: Path, environment: Mapping[str, str], timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """The exit code and the output of ``python -m module`` under an environment; ``timeout`` in seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            argv, files = [module, *arguments], [str(out), str(err)]
            request = {"argv": argv, "cwd": str(cwd), "environment": dict(environment), "files": files}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.stdout.readline()
            assert code, f"{argv} did not end within {timeout:g} s: {err.read_text()}"
            return subprocess.CompletedProcess(argv, int(code), out.read_text(), err.read_text())

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


def serve(modules: Sequence[str]) -> None:
    """Answer each request, a line of JSON, with an exit code; in a fork, run the module that it names."""
    for name in modules:
        import_module(name)
    _fork_workers()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(**json.loads(line))
            break
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _fork_workers() -> None:
    worker_process = import_module("kbitcheck.run.worker_process")
    import_module("kbitcheck.run.worker")
    spec = spec_from_file_location("forked_worker", Path(__file__).with_name("forked_worker.py"))
    assert spec is not None
    assert spec.loader is not None
    forked_worker = module_from_spec(spec)
    spec.loader.exec_module(forked_worker)
    setattr(worker_process, "subprocess", forked_worker.forking())  # noqa: B010


def become(argv: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """Run a module as the whole of this process."""
    for fd, path in enumerate([os.devnull, *files]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, cwd)
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
