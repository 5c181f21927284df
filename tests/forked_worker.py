"""Workers as forks of the process that starts them: what a worker imports takes longer than what it does on the stubs."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NoReturn

MODULE = "kbitcheck.run.worker"
PATH = tuple(sys.path)  # before a working directory or an implementation's is added


class ForkedWorker:
    """A process of ``python -P -m kbitcheck.run.worker``, with what is used of ``subprocess.Popen``."""

    def __init__(self, arguments: Sequence[str], pass_fds: Iterable[int], env: Mapping[str, str]) -> None:
        output, written = os.pipe()
        started, starting = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(starting)
            _become(arguments, {*pass_fds}, env, written)
        os.close(written)
        os.close(starting)
        os.read(started, 1)  # until it leads a group of its own, which a caller may end
        os.close(started)
        self.stdout = os.fdopen(output, "rb", buffering=0)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._reap(0 if deadline is None else os.WNOHANG)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(MODULE, timeout or 0.0)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send the process a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, options)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def start(command: Sequence[str], *, pass_fds: Iterable[int], env: Mapping[str, str], **options: Any) -> Any:
    """As ``subprocess.Popen`` starts a worker; that of another interpreter is no fork."""
    if command[0] != sys.executable:
        return subprocess.Popen(command, pass_fds=tuple(pass_fds), env=env, **options)
    assert command[1:4] == ["-P", "-m", MODULE]
    return ForkedWorker(command[4:], pass_fds, env)


def forking() -> SimpleNamespace:
    """The module ``subprocess`` with workers that are forks."""
    return SimpleNamespace(**{**vars(subprocess), "Popen": start})


def _become(arguments: Sequence[str], kept: set[int], env: Mapping[str, str], output: int) -> NoReturn:
    """Run the worker as the whole of this process, with nothing of its parent's but modules."""
    code = 1
    try:
        for fd, source in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(source, fd)
        for low, high in pairwise([2, *sorted(kept), 4096]):  # far more than there are
            os.closerange(low + 1, high)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd, name in enumerate(("stdin", "stdout", "stderr")):
            stream = os.fdopen(fd, "w" if fd else "r", buffering=1, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.environ.clear()
        os.environ.update(env)
        sys.path[:] = dict.fromkeys([*filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *PATH])
        sys.argv = [MODULE, *arguments]
        tempfile.tempdir = None
        sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
        del sys.modules[MODULE]
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException:  # as of a process of its own: nothing here goes on in the parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)
