"""The rows of a sweep, each made by the worker that takes the architecture. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from kbitcheck.compare.sweep import Row, row
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Lost, UsageError, cause
from kbitcheck.core.events import Architectures, Collector
from kbitcheck.core.result import Status
from kbitcheck.core.rule import Rule
from kbitcheck.run.pool import Worker, spread
from kbitcheck.run.requests import ListArchitectures
from kbitcheck.run.worker_process import answers, scratch_directory

LISTING_SECONDS = 300.0


def architectures(task: str, echo: Callable[[str], None] | None = None) -> dict[str, str]:
    """Class by model type: what the installed transformers has for a task. A worker looks, for this process has no torch.

    Raises:
        Lost: the worker process ended without a list.
    """
    try:
        with contextlib.closing(answers(ListArchitectures(task=task), LISTING_SECONDS, echo)) as listing:
            return next(dict(event.classes) for event in listing if isinstance(event, Architectures))
    except StopIteration:
        raise Lost("the worker listed no architectures") from None
    except UsageError as error:
        raise Lost(str(error)) from error


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

    def serve(worker: Worker, name: str) -> Iterator[Row]:
        collector = Collector()
        try:
            for event in worker.examine(spec(name), rules):
                collector.add(event)
            if collector.loaded.environment:
                on_environment(collector.loaded.environment)
            yield _row(name, classes[name], spec(name), collector)
        except UsageError as error:
            if not worker.loaded:  # the implementation's fault, not this architecture's
                raise
            yield _not_audited(name, classes[name], spec(name), error.cause or str(error))
        except Exception as error:
            yield _not_audited(name, classes[name], spec(name), cause(error))

    with contextlib.ExitStack() as stack:
        scratch = [stack.enter_context(scratch_directory()) for _ in range(min(jobs, len(classes)))]
        workers = [Worker(directory, timeout, echo) for directory in scratch]
        yield from stack.enter_context(contextlib.closing(spread(list(classes), serve, workers)))


def _row(name: str, cls: str, spec: CaseSpec, collector: Collector) -> Row:
    facts = collector.facts.get(spec.id)
    if facts is None:
        reason = next((r.reason for r in collector.results if r.status is Status.ERROR), "nothing was examined")
        return _not_audited(name, cls, spec, reason)
    return row(name, cls, spec.model, collector.results, facts)


def _not_audited(name: str, cls: str, spec: CaseSpec, reason: str) -> Row:
    return Row(architecture=name, cls=cls, model=spec.model, loads=False, reason=" ".join(reason.split()))
