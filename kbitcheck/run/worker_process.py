"""The parent's side of a worker process: starts it, sends requests, reads events, and says how it ended."""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

from kbitcheck.core import events
from kbitcheck.core.errors import Lost, UsageError
from kbitcheck.core.events import Event
from kbitcheck.core.machine import SAME_KERNELS, WORKER
from kbitcheck.run.requests import Request, as_json

READY_SECONDS = 300.0  # importing torch and transformers with a cold cache takes tens of seconds
TAIL_BYTES = 1 << 16
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary directory for worker processes."""
    with tempfile.TemporaryDirectory(prefix="kbitcheck-", ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def answers(request: Request, seconds: float, echo: Callable[[str], None] | None) -> Generator[Event, None, None]:
    """The events that answer one request, from a process that ends with it.

    ``Lost`` says that it ended or broke before, or that one answer took longer than ``seconds``.
    """
    with scratch_directory() as scratch, contextlib.closing(WorkerProcess(scratch, echo)) as process:
        for event in process.ask(request, seconds):
            if isinstance(event, events.WrongUsage):
                raise UsageError(event.message)
            if isinstance(event, events.Broken):
                raise Lost(event.cause, short_of=event.short_of)
            yield event


class WorkerProcess:
    """A running worker process. ``scratch`` becomes its TMPDIR; ``echo`` gets its output and the implementation's.

    ``environment`` are variables that it gets besides this process's own; ``python`` is the interpreter that runs it.
    """

    def __init__(
        self,
        scratch: Path,
        echo: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        python: str = sys.executable,
    ) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._open = {self._requests, self._replies}
        self._echo = echo
        self._printed = b""
        self._unread = b""
        self._ready = False
        self._popen = subprocess.Popen(
            # -P: a torch.py in the working directory must not be imported in torch's place.
            [python, "-P", "-m", "kbitcheck.run.worker", str(requests), str(replies)],
            pass_fds=(requests, replies),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env={**os.environ, **WORKER, **SAME_KERNELS, **(environment or {}), "TMPDIR": str(scratch)},
            start_new_session=True,
        )
        os.close(requests)
        os.close(replies)
        assert self._popen.stdout is not None
        self._log = self._popen.stdout.fileno()
        for fd in (self._replies, self._log):
            os.set_blocking(fd, False)

    def ask(self, request: Request, seconds: float) -> Iterator[Event]:
        """The events that answer a request; the last one is in ``events.LAST``.

        The first request also waits until the process is ready, which is not counted in ``seconds``. ``Lost`` says that
        no last event came within them, or that the process ended.
        """
        if not self._ready:
            for event in self._events(READY_SECONDS):
                if isinstance(event, events.Broken):
                    raise Lost(f"the worker could not start: {event.cause}")
            self._ready = True
        with contextlib.suppress(BrokenPipeError):
            os.write(self._requests, (json.dumps(as_json(request)) + "\n").encode())
        yield from self._events(seconds)

    def _events(self, seconds: float) -> Iterator[Event]:
        deadline = time.monotonic() + seconds
        while True:
            line = self._line(deadline)
            if line is None:
                raise Lost(f"no result within {seconds:g} s{self._whereabouts()}", short_of="time")
            try:
                event = events.from_json(json.loads(line))
            except ValueError:
                raise Lost("the worker's pipe was written to by the implementation") from None
            yield event
            if isinstance(event, events.LAST):
                return

    def _line(self, deadline: float) -> bytes | None:
        """The next line of the replies, or None at the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            selector.register(self._log, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                # A grandchild may hold the pipes open after the worker's death: look at the worker, not at them alone.
                dead = self._popen.poll() is not None
                for key, _ in selector.select(0 if dead else min(left, 0.25)):
                    if not self._pump(key.fd):
                        selector.unregister(key.fd)
                if dead and b"\n" not in self._unread:
                    raise Lost(self._obituary(), short_of="memory" if self._popen.returncode == -signal.SIGKILL else "")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _pump(self, fd: int) -> bool:
        """Read the bytes that are there; False at the end of the pipe."""
        try:
            chunk = os.read(fd, TAIL_BYTES)
        except BlockingIOError:
            return True
        if fd == self._replies:
            self._unread += chunk
        elif chunk:
            self._printed = (self._printed + chunk)[-TAIL_BYTES:]
            if self._echo is not None:
                self._echo(chunk.decode(errors="replace"))
        return bool(chunk)

    def _drain(self) -> None:
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            before = self._printed
            if not self._pump(self._log):
                return
            if self._printed == before:
                time.sleep(0.02)

    def _whereabouts(self) -> str:
        """Where a hung worker is, from the stack that faulthandler prints on SIGUSR1."""
        mark = len(self._printed)
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGUSR1)
        self._drain()
        return self._innermost(self._printed[mark:] or self._printed)

    def _obituary(self) -> str:
        self._drain()
        code = self._popen.returncode
        if code >= 0:
            last = self._printed.decode(errors="replace").strip().splitlines()[-1:]
            return f"the process ended itself with exit code {code}" + (f"; it last printed: {last[0]}" if last else "")
        name = signal.Signals(-code).name
        why = {signal.SIGKILL: "out of memory, or by itself", signal.SIGTERM: "asked to end"}.get(signal.Signals(-code))
        return f"the process was killed by {name} ({why or signal.strsignal(-code)}){self._innermost(self._printed)}"

    def _innermost(self, printed: bytes) -> str:
        """The innermost frame of faulthandler's last dump, if there is one."""
        _, dump, frames = printed.decode(errors="replace").rpartition("(most recent call first)")
        frame = FRAME.search(frames) if dump else None
        return f", in {frame['name']} at {frame['file']}:{frame['line']}" if frame else ""

    def close(self) -> None:
        """End the process and all that it started: it may end by itself first, unless it is in the middle of a request."""
        self._close(self._requests)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)
        self.stop()
        self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()
        self._close(self._replies)

    def stop(self) -> None:
        """End the process and its group at once; a thread that waits for an answer gets ``Lost``."""
        # The group, and not the tree: a grandchild whose parent is dead is in no tree.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def _close(self, fd: int) -> None:
        if fd in self._open:  # Ctrl-C may have cut an earlier ``close`` short
            self._open.remove(fd)
            os.close(fd)
