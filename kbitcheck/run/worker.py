"""The child process that judges cases, ``python -m kbitcheck.run.worker REQUESTS REPLIES``: JSON lines over two pipes.

Nothing here imports torch before ``main`` runs: the process is there, and listens, before its imports are done.
"""

import dataclasses
import faulthandler
import gc
import json
import logging
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import IO

from kbitcheck.core import events
from kbitcheck.core.cases import Implementation
from kbitcheck.core.errors import UsageError, cause, short_of
from kbitcheck.core.events import Event
from kbitcheck.core.machine import LARGE_BYTES
from kbitcheck.core.rule import log, rules
from kbitcheck.run import requests
from kbitcheck.run.examine import examine
from kbitcheck.run.subject import Missing, load, unused


def debug_to_stderr() -> None:
    """Print the tracebacks of rules that raised."""
    log.setLevel(logging.DEBUG)
    log.addHandler(logging.StreamHandler())


class Server:
    """Answers requests one by one; the implementation it loaded stays loaded."""

    def __init__(self, replies: IO[str]) -> None:
        self._replies = replies
        self._implementation: Implementation | None = None
        self._device = "cpu"
        self._threads = 1

    def answer(self, request: requests.Request | None) -> None:
        """Send the events that answer a request (None: get ready for requests); the last one is in ``events.LAST``."""
        try:
            for event in self._events(request):
                self._send(event)
        except UsageError as error:
            self._send(
                events.WrongUsage(
                    message=str(error),
                    cause=error.cause,
                    missing=isinstance(error, Missing),
                    traceback=traceback.format_exc(),
                )
            )
        except BaseException as error:
            # A subject may raise SystemExit or KeyboardInterrupt; whatever it raises is the case's end, not the run's.
            # Without memory, or after an error on an accelerator, the next case could fail for this one's reason.
            short = short_of(error)
            fatal = short == "memory" or not isinstance(error, Exception) or self._device != "cpu"
            self._send(events.Broken(cause=cause(error), fatal=fatal, short_of=short, traceback=traceback.format_exc()))

    def _send(self, event: Event) -> None:
        self._replies.write(json.dumps(event.as_json()) + "\n")
        self._replies.flush()

    def _events(self, request: requests.Request | None) -> Iterator[Event]:
        match request:
            case None:
                yield self._ready()
            case requests.Load():
                yield self._load(request)
            case requests.Examine():
                yield from self._examine(request)
                yield events.Done()
            case requests.MakePlan():
                yield from self._plan(request)
                yield events.Done()
            case requests.ListArchitectures(task=task):
                from kbitcheck.models.sources.architecture import listed

                yield events.Architectures(classes=listed(task))
                yield events.Done()
            case requests.TryFaults(codes=codes, matrix=matrix):
                from kbitcheck.run import selftest

                yield from selftest.run(codes, matrix=matrix)
                yield events.Done()

    def _ready(self) -> Event:
        """Import the stack and the oracle, before any subject can patch them."""
        gc.disable()
        import kbitcheck_reference  # noqa: F401
        import torch

        import kbitcheck.observe.open_case  # noqa: F401
        from kbitcheck.observe.garbage import keep_imports

        keep_imports()
        gc.enable()
        # One thread until a model is worth more: on tiny ones threads only wait for each other.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return events.Ready()

    def _load(self, request: requests.Load) -> Event:
        from kbitcheck.observe import device as devices
        from kbitcheck.observe import garbage
        from kbitcheck.observe.probes import files_written

        files_written.watch()
        self._device = devices.resolve_device(request.device)
        environment = devices.describe(self._device, request.seed)
        # In front, in their order, and only now: nothing of the subject's may stand in for the stack.
        sys.path[:0] = [directory for directory in request.path if directory not in sys.path]
        self._implementation = (unused if request.static else load)(request.implementation)
        rules()
        garbage.keep_imports()
        return events.Loaded(implementation=self._implementation.as_json(), environment=environment)

    def _examine(self, request: requests.Examine) -> Iterator[Event]:
        import torch

        from kbitcheck.observe.open_case import open_case

        assert self._implementation is not None
        spec = request.spec
        if spec.static != "always":  # which is about whatever device was named, here or elsewhere
            spec = dataclasses.replace(spec, device=self._device)
        torch.set_num_threads(self._threads)
        selected = [rules()[code] for code in request.rules]
        case = open_case(spec, self._implementation, rules=selected, seconds=request.seconds)
        if case.base.nbytes <= LARGE_BYTES:
            torch.set_num_threads(1)
        yield from examine(case, selected, device=self._device, tell=self._send)

    def _plan(self, request: requests.MakePlan) -> Iterator[Event]:
        from kbitcheck.observe import device as devices
        from kbitcheck.observe.open_case import plans_of

        specs = [dataclasses.replace(spec, device=devices.resolve_device(spec.device)) for spec in request.specs]
        for plan in plans_of(specs, [rules()[code] for code in request.rules], seconds=request.seconds):
            yield events.Planned(plan=plan)


def main(requests_fd: int, replies_fd: int) -> None:
    """Serve until the parent closes its end of the pipe or dies."""
    for fd in (requests_fd, replies_fd):
        os.set_inheritable(fd, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    debug_to_stderr()
    server = Server(os.fdopen(replies_fd, "w", encoding="utf-8"))
    inbox: queue.SimpleQueue[requests.Request] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests_fd, inbox), daemon=True).start()
    server.answer(None)
    while True:
        server.answer(inbox.get())


def _receive(fd: int, inbox: queue.SimpleQueue[requests.Request]) -> None:
    """Feed the inbox. At the end of the pipe the parent is gone: leave at once, also in the middle of a case."""
    with os.fdopen(fd, encoding="utf-8") as lines:
        for line in lines:
            inbox.put(requests.from_json(json.loads(line)))
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
