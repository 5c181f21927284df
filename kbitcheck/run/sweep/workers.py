"""Workers that each take the next architecture and make its row. No torch here."""

from __future__ import annotations

import contextlib
import queue
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbitcheck.compare.sweep import Row, row
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Lost, UsageError, cause
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import Rule
from kbitcheck.run.pool import Bench
from kbitcheck.run.worker_process import WorkerProcess

LISTING_SECONDS = 300.0


def architectures(task: str, echo: Callable[[str], None] | None = None) -> dict[str, str]:
    """Class by model type: what the installed transformers has for a task. A worker looks, for this process has no torch.

    Raises:
        Lost: the worker could not tell.
    """
    with tempfile.TemporaryDirectory(prefix="kbitcheck-", ignore_cleanup_errors=True) as scratch:
        worker = WorkerProcess(Path(scratch), echo)
        try:
            for event in worker.ask({"do": "architectures", "task": task}, LISTING_SECONDS):
                if event["event"] == "architectures":
                    return dict(event["classes"])
                if event["event"] in ("broken", "usage"):
                    raise Lost(str(event.get("cause") or event.get("message")))
        finally:
            worker.close()
    raise Lost("the worker listed no architectures")


def examine(
    classes: Mapping[str, str],
    spec: Callable[[str], CaseSpec],
    rules: Sequence[Rule],
    *,
    jobs: int,
    timeout: float,
    on_environment: Callable[[Mapping[str, Any]], None],
    echo: Callable[[str], None] | None = None,
) -> Generator[Row, None, None]:
    """A row for each architecture, as they finish. ``jobs`` workers each take the next one; all end with the generator.

    Raises:
        UsageError: the implementation cannot be loaded.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in classes:
        todo.put(name)
    done: queue.Queue[Row | UsageError] = queue.Queue()
    stop = threading.Event()

    with contextlib.ExitStack() as stack:
        benches = []
        for _ in range(min(jobs, len(classes))):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="kbitcheck-", ignore_cleanup_errors=True))
            benches.append(Bench(Path(scratch), rules, timeout, echo))
            stack.callback(benches[-1].close)

        def serve(bench: Bench) -> None:
            with contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    name = todo.get_nowait()
                    try:
                        done.put(_examined(bench, name, classes[name], spec(name), on_environment))
                    except UsageError as error:
                        done.put(error)
                        return
                    except Exception as error:
                        done.put(_lost(name, classes[name], spec(name), cause(error)))

        threads = [threading.Thread(target=serve, args=(bench,), daemon=True) for bench in benches]
        try:
            for thread in threads:
                thread.start()
            for _ in classes:
                found = done.get()
                if isinstance(found, UsageError):
                    raise found
                yield found
        finally:
            stop.set()


def _examined(
    bench: Bench, name: str, cls: str, spec: CaseSpec, on_environment: Callable[[Mapping[str, Any]], None]
) -> Row:
    results: list[Result] = []
    facts: Mapping[str, Any] | None = None
    try:
        for event in bench.examine(spec):
            if event["event"] == "result":
                results.append(Result.from_json(event["result"]))
            elif event["event"] == "facts":
                facts = event["facts"]
            elif event["event"] == "loaded":
                on_environment(event["environment"])
    except UsageError as error:
        if not bench.loaded:  # the implementation's fault, not this architecture's
            raise
        return _lost(name, cls, spec, str(error))
    if facts is None:
        reason = next((r.reason for r in results if r.status is Status.ERROR), "nothing was examined")
        return _lost(name, cls, spec, reason)
    return row(name, cls, spec.model, results, facts)


def _lost(name: str, cls: str, spec: CaseSpec, reason: str) -> Row:
    """An architecture that was not audited."""
    prefix = f"{spec.model} cannot be loaded "
    told = reason.removeprefix(prefix).removeprefix("(").removesuffix(")") if reason.startswith(prefix) else reason
    return Row(architecture=name, cls=cls, model=spec.model, loads=False, reason=" ".join(told.split()))
