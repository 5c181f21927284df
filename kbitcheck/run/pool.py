"""A bench examines cases of one implementation in a worker; several share a list of tasks."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Lost, UsageError
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import Rule
from kbitcheck.run.worker import Event
from kbitcheck.run.worker_process import WorkerProcess

POISON = ("MemoryError", "CUDA")  # what leaves a process that the next case cannot trust

Task = TypeVar("Task")
Found = TypeVar("Found")


class Bench:
    """Examines cases of one implementation in a worker, and replaces a worker that a case has ruined.

    ``path`` are directories from which the worker imports the implementation, ``environment`` variables it gets,
    and ``python`` the interpreter that runs it.
    """

    def __init__(
        self,
        scratch: Path,
        rules: Sequence[Rule],
        timeout: float,
        echo: Callable[[str], None] | None = None,
        *,
        path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self._scratch, self._rules, self._timeout, self._echo = scratch, rules, timeout, echo
        self._path, self._environment, self._python = path, environment, python
        self._worker: WorkerProcess | None = None
        self.loaded = False
        self._hopeless = ""

    def start(self) -> None:
        self._worker = WorkerProcess(self._scratch, self._echo, self._environment, python=self._python)
        self.loaded = False

    def stop(self) -> None:
        """End the worker in the middle of whatever it does; who waits for it, in another thread, is told."""
        if (worker := self._worker) is not None:
            worker.stop()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self.loaded = False

    def examine(self, spec: CaseSpec, rules: Sequence[Rule] | None = None) -> Iterator[Event]:
        """The events of one case, by other rules if given; ERROR results fill in for what a lost worker did not report."""
        rules = self._rules if rules is None else rules
        if not self.loaded and not self._hopeless:
            yield from self._load(spec)
        if self._hopeless:
            yield from broken(spec, rules, set(), self._hopeless)
            return
        seen: set[str] = set()
        try:
            yield from self._case(spec, rules, seen)
        except Lost as lost:
            self.close()
            yield from broken(spec, rules, seen, str(lost))

    def _load(self, spec: CaseSpec) -> Iterator[Event]:
        """Load the implementation. Where even that ends the worker, no case can be run."""
        if self._worker is None:
            self.start()
        request = {
            "do": "load",
            "implementation": spec.implementation,
            "path": list(self._path),
            "device": spec.device,
            "seed": spec.seed,
            "static": spec.static == "always",
        }
        try:
            yield from self._ask(request)
            self.loaded = True
        except Lost as lost:
            self._hopeless = f"{spec.implementation} could not be loaded: {lost}"

    def _case(self, spec: CaseSpec, rules: Sequence[Rule], seen: set[str]) -> Iterator[Event]:
        request = {
            "do": "case",
            "spec": spec.as_json(),
            "rules": [rule.code for rule in rules],
            "seconds": self._timeout,
        }
        poisoned = False
        for event in self._ask(request):
            if event["event"] == "result":
                seen.add(event["result"]["rule"])
                reason = event["result"].get("reason", "")
                poisoned |= event["result"]["status"] == Status.ERROR and any(word in reason for word in POISON)
            elif event["event"] == "broken":
                poisoned |= event["fatal"]
                yield from broken(spec, rules, seen, event["cause"])
            yield event
        if poisoned:
            self.close()

    def _ask(self, request: Event) -> Iterator[Event]:
        assert self._worker is not None
        for event in self._worker.ask(request, self._timeout):
            if self._echo is not None and "traceback" in event:
                self._echo(event["traceback"])
            if event["event"] == "usage":
                raise UsageError(event["message"])
            if event["event"] == "broken" and request["do"] == "load":
                raise Lost(event["cause"])
            yield event


def broken(spec: CaseSpec, rules: Sequence[Rule], seen: set[str], why: str) -> Iterator[Event]:
    """An ERROR result for every rule that a case did not come to."""
    for rule in rules:
        if rule.code not in seen:
            result = Result(rule=rule.code, case=spec.id, level=rule.level, status=Status.ERROR, reason=why)
            yield {"event": "result", "result": result.as_json()}


Serve = Callable[[Bench, Task], Iterable[Found]]


def spread(tasks: Sequence[Task], serve: Serve[Task, Found], benches: Sequence[Bench]) -> Generator[Found, None, None]:
    """What ``serve`` finds in each task, as it comes. Each bench takes the next task; all are closed at the end.

    Raises:
        BaseException: whatever ``serve`` raised first; the other benches are stopped.
    """
    todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        todo.put(task)
    found: queue.SimpleQueue[Found | _End] = queue.SimpleQueue()
    stopped = threading.Event()
    with contextlib.ExitStack() as stack:
        for bench in benches:
            bench.start()  # before anything else: it takes seconds to get warm
            thread = threading.Thread(target=_work, args=(bench, serve, todo, found, stopped), daemon=True)
            stack.callback(_end, bench, thread, stopped)
            thread.start()
        working = len(benches)
        while working:
            one = found.get()
            if not isinstance(one, _End):
                yield one
            elif one.error is not None:
                raise one.error
            else:
                working -= 1


@dataclass(frozen=True, slots=True)
class _End:
    """A bench has nothing more to do, or no longer can."""

    error: BaseException | None = None


def _work(
    bench: Bench,
    serve: Serve[Task, Found],
    todo: queue.SimpleQueue[Task],
    found: queue.SimpleQueue[Found | _End],
    stopped: threading.Event,
) -> None:
    end = _End()
    try:
        while not stopped.is_set():
            for one in serve(bench, todo.get_nowait()):
                found.put(one)
                if stopped.is_set():
                    break
    except queue.Empty:
        pass
    except BaseException as error:
        end = _End(error)
    finally:
        found.put(end)


def _end(bench: Bench, thread: threading.Thread, stopped: threading.Event) -> None:
    stopped.set()
    while thread.is_alive():
        bench.stop()
        thread.join(0.1)
    bench.close()
