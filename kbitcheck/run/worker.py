"""The child process that runs cases, ``python -m kbitcheck.run.worker REQUESTS REPLIES``: JSON lines over two pipes.

Nothing here imports torch before ``main`` runs, so that the parent can share the message types.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError, cause
from kbitcheck.core.rule import Rule, judge, log, rules
from kbitcheck.observe.heap import LARGE_BYTES
from kbitcheck.run.subject import Implementation, Missing, load, unused

if TYPE_CHECKING:
    from kbitcheck.observe.case import Case
    from kbitcheck.observe.static import StaticCase

Event = dict[str, Any]

# What ends the answer to a request.
LAST = frozenset({"ready", "loaded", "done", "usage", "broken"})


def examine(case: Case | StaticCase, selected: Sequence[Rule]) -> Iterator[Event]:
    """Judge every rule on a case, tell its facts, and close it."""
    with contextlib.closing(case):
        for rule in selected:
            yield {"event": "result", "result": judge(rule, case).as_json()}
        yield {"event": "facts", "case": case.case, "facts": case.summary()}


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

    def answer(self, request: Event) -> None:
        """Run one request; the last event sent is one of ``LAST``."""
        try:
            for event in getattr(self, f"_{request['do']}")(request):
                self._send(event)
        except UsageError as error:
            missing = isinstance(error, Missing)
            told = {"event": "usage", "message": str(error), "missing": missing, "traceback": traceback.format_exc()}
            self._send(told)
        except BaseException as error:
            # A subject may raise SystemExit or KeyboardInterrupt; whatever it raises is the case's end, not the run's.
            # Memory and CUDA errors leave a process that is not to be trusted with the next case.
            fatal = isinstance(error, MemoryError) or not isinstance(error, Exception) or "CUDA" in str(error)
            told = {"event": "broken", "cause": cause(error), "fatal": fatal, "traceback": traceback.format_exc()}
            self._send(told)

    def _send(self, event: Event) -> None:
        self._replies.write(json.dumps(event) + "\n")
        self._replies.flush()

    def _warm(self, request: Event) -> Iterator[Event]:
        """Import the stack and the oracle, before any subject can patch them."""
        gc.disable()
        import kbitcheck_reference  # noqa: F401
        import torch

        import kbitcheck.observe.case  # noqa: F401

        gc.enable()
        # One thread until a model is worth more: on tiny ones threads only wait for each other.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield {"event": "ready"}

    def _load(self, request: Event) -> Iterator[Event]:
        from kbitcheck.core import machine as environment

        self._device = environment.resolve_device(request["device"])
        told = environment.describe(self._device, request["seed"])
        # In front, in their order, and only now: nothing of the subject's may stand in for the stack.
        sys.path[:0] = [directory for directory in request.get("path", ()) if directory not in sys.path]
        self._implementation = (unused if request.get("static") else load)(request["implementation"])
        yield {"event": "loaded", "implementation": self._implementation.as_json(), "environment": told}

    def _case(self, request: Event) -> Iterator[Event]:
        import torch

        from kbitcheck.observe.case import open_case

        assert self._implementation is not None
        spec = CaseSpec.from_json(request["spec"])
        if spec.static != "always":  # which is about whatever device was named, here or elsewhere
            spec = dataclasses.replace(spec, device=self._device)
        known = rules()
        torch.set_num_threads(self._threads)
        case = open_case(spec, self._implementation, seconds=request["seconds"])
        if case.base.nbytes <= LARGE_BYTES:
            torch.set_num_threads(1)
        yield from examine(case, [known[code] for code in request["rules"]])
        yield {"event": "done"}

    def _architectures(self, request: Event) -> Iterator[Event]:
        from kbitcheck.models.sources.architecture import listed

        yield {"event": "architectures", "classes": listed(request["task"])}
        yield {"event": "done"}

    def _selftest(self, request: Event) -> Iterator[Event]:
        from kbitcheck.run import selftest

        for verdict in selftest.run(request["codes"], matrix=request["matrix"]):
            yield {"event": "sabotage", **verdict.as_json()}
        yield {"event": "done"}


def main(requests: int, replies: int) -> None:
    """Serve until the parent closes its end of the pipe or dies."""
    for fd in (requests, replies):
        os.set_inheritable(fd, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    debug_to_stderr()
    server = Server(os.fdopen(replies, "w", encoding="utf-8"))
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, inbox), daemon=True).start()
    server.answer({"do": "warm"})
    while True:
        server.answer(inbox.get())


def _receive(requests: int, inbox: queue.SimpleQueue[Event]) -> None:
    """Feed the inbox. At the end of the pipe the parent is gone: leave at once, also in the middle of a case."""
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            inbox.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
