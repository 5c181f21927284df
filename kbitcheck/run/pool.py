"""Workers, each with a process of its own that it replaces when a case has ruined it; and tasks spread over them."""

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Lost, Short, UsageError
from kbitcheck.core.events import Broken, Event, Judged, WrongUsage
from kbitcheck.core.result import Status
from kbitcheck.core.rule import Rule
from kbitcheck.run.beside_reference import settled
from kbitcheck.run.examine import not_reached
from kbitcheck.run.requests import Examine, Load, Request
from kbitcheck.run.worker_process import WorkerProcess

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Worker:
    """Examines cases of one implementation in a worker process, and replaces a process that a case has ruined.

    ``path`` are directories from which the process imports the implementation, ``environment`` variables it gets, and
    ``python`` the interpreter that runs it. ``loaded`` says whether it has the implementation. With ``beside_reference`` an ERROR
    that the reference does not have on the same case is a failure of the implementation.
    """

    def __init__(
        self,
        scratch: Path,
        timeout: float,
        echo: Callable[[str], None] | None = None,
        *,
        path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
        beside_reference: bool = False,
    ) -> None:
        self._scratch, self._timeout, self._echo = scratch, timeout, echo
        self._path, self._environment, self._python = path, environment, python
        self._process: WorkerProcess | None = None
        self.loaded = False
        self._cannot_load = ""
        self._short_of: Short = ""
        self._beside_reference = beside_reference
        self._reference: Worker | None = None

    def start(self) -> None:
        """Start the process, which takes seconds to get ready."""
        self._process = WorkerProcess(self._scratch, self._echo, self._environment, python=self._python)

    def stop(self) -> None:
        """End the process in the middle of its work; a thread that waits for its answer gets ``Lost``."""
        if (process := self._process) is not None:
            process.stop()
        if (reference := self._reference) is not None:
            reference.stop()

    def close(self) -> None:
        """End the process, and the one that has the reference."""
        if self._reference is not None:
            self._reference.close()
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None
        self.loaded = False

    def examine(self, spec: CaseSpec, rules: Sequence[Rule]) -> Iterator[Event]:
        """The events of one case; a rule that a lost process did not reach is an ERROR.

        A ``UsageError`` says that the model or, where ``loaded`` is still False, the implementation cannot be loaded.
        """
        errors: list[Judged] = []
        for event in self._examine(spec, rules):
            if isinstance(event, Judged) and event.result.status is Status.ERROR and self._beside_reference:
                errors.append(event)
            else:
                yield event
        if errors:
            yield from settled(spec, rules, errors, self._ask_reference)

    def _ask_reference(self, spec: CaseSpec, rules: Sequence[Rule], share: float) -> Iterator[Event]:
        if self._reference is None:
            self._reference = Worker(
                self._scratch, self._timeout, path=self._path, environment=self._environment, python=self._python
            )
        return self._reference._examine(spec, rules, share)

    def _examine(self, spec: CaseSpec, rules: Sequence[Rule], share: float = 1.0) -> Iterator[Event]:
        if not self.loaded and not self._cannot_load:
            yield from self._load(spec)
        if self._cannot_load:
            yield from not_reached(spec, rules, (), self._cannot_load, self._short_of)
            return
        request = Examine(spec=spec, rules=tuple(rule.code for rule in rules), seconds=self._timeout)
        reached: set[str] = set()
        fatal = False
        try:
            for event in self._ask(request, share):
                if isinstance(event, Judged):
                    reached.add(event.result.rule)
                elif isinstance(event, Broken):
                    yield from not_reached(spec, rules, reached, event.cause, event.short_of)
                fatal |= isinstance(event, (Judged, Broken)) and event.fatal
                yield event
        except Lost as lost:
            self._end()
            yield from not_reached(spec, rules, reached, str(lost), lost.short_of)
        if fatal:
            self._end()

    def _load(self, spec: CaseSpec) -> Iterator[Event]:
        """Load the implementation. Where even that ends the process, no case can be run."""
        if self._process is None:
            self.start()
        request = Load(
            implementation=spec.implementation,
            path=tuple(self._path),
            device=spec.device,
            seed=spec.seed,
            static=spec.static == "always",
        )
        try:
            for event in self._ask(request):
                if isinstance(event, Broken):
                    raise Lost(event.cause, short_of=event.short_of)
                yield event
            self.loaded = True
        except Lost as lost:
            self._cannot_load, self._short_of = f"{spec.implementation} could not be loaded: {lost}", lost.short_of

    def _ask(self, request: Request, share: float = 1.0) -> Iterator[Event]:
        assert self._process is not None
        for event in self._process.ask(request, share * self._timeout):
            if self._echo is not None and isinstance(event, (Broken, WrongUsage)):
                self._echo(event.traceback)
            if isinstance(event, WrongUsage):
                raise UsageError(event.message, cause=event.cause)
            yield event


def spread(
    tasks: Sequence[Task], serve: Callable[[Worker, Task], Iterable[Answer]], workers: Sequence[Worker]
) -> Generator[Answer, None, None]:
    """The answers of ``serve`` to all tasks, as they come. Each worker takes the next task; all are closed at the end.

    What ``serve`` raises first is raised here, and the other workers are stopped.
    """
    todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        todo.put(task)
    answers: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()  # None: no more from one worker
    stopped = threading.Event()
    with contextlib.ExitStack() as stack:
        for worker in workers:
            worker.start()  # before anything else: it takes seconds to get ready
            thread = threading.Thread(target=_work, args=(worker, serve, todo, answers, stopped), daemon=True)
            stack.callback(_end, worker, thread, stopped)
            thread.start()
        working = len(workers)
        while working:
            answer = answers.get()
            if answer is None:
                working -= 1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                yield answer


def _work(
    worker: Worker,
    serve: Callable[[Worker, Task], Iterable[Answer]],
    todo: queue.SimpleQueue[Task],
    answers: queue.SimpleQueue[Answer | BaseException | None],
    stopped: threading.Event,
) -> None:
    end: BaseException | None = None
    try:
        while not stopped.is_set():
            for answer in serve(worker, todo.get_nowait()):
                answers.put(answer)
                if stopped.is_set():
                    break
    except queue.Empty:
        pass
    except BaseException as error:
        end = error
    answers.put(end)


def _end(worker: Worker, thread: threading.Thread, stopped: threading.Event) -> None:
    stopped.set()
    while thread.is_alive():
        worker.stop()
        thread.join(0.1)
    worker.close()
