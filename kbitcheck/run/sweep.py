"""Audits every architecture of the installed transformers: one row each, several workers at once. No torch here."""

import contextlib
import dataclasses
import fnmatch
import json
import os
import platform
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbitcheck.compare.sweep import Row, Table, row
from kbitcheck.core import machine
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Lost, UsageError, cause
from kbitcheck.core.events import Architectures, Collector
from kbitcheck.core.pace import Pace
from kbitcheck.core.result import Status
from kbitcheck.core.rule import select
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.core.version import VERSION
from kbitcheck.run import requirements, subject
from kbitcheck.run.pool import Worker, spread
from kbitcheck.run.requests import ListArchitectures
from kbitcheck.run.worker_process import answers, scratch_directory

LISTING_SECONDS = 300.0
Echo = Callable[[str], None] | None


def swept(
    task: str,
    template: CaseSpec,
    *,
    select: Sequence[str],
    shard: tuple[int, int],
    jobs: int,
    timeout: float,
    output: str,
    command: str,
    say: Callable[[str], None],
    echo: Echo,
) -> Table:
    """Audit the architectures of a task, each as a case like ``template``; an interrupt leaves the rows so far.

    ``shard`` is a part, counted from 1, and the number of parts; ``timeout`` is in seconds for each architecture; rows
    are kept in ``output`` + ``.jsonl``, unless ``output`` is empty; ``command`` is the command that gives the same
    table again. ``say`` gets a line for each row as it comes. ``Lost`` says that the architectures cannot be
    listed.
    """
    subject.validate(template.implementation)
    if requirements.parse(template.implementation):
        raise UsageError(f"--prepare {template.implementation}: a sweep is of the transformers that is installed here")
    machine.validate_device(template.device)
    key = {"task": task, "prepare": template.implementation} | {
        name: getattr(template, name) for name in ("quant", "device", "checkpointing", "profile", "seed")
    }
    path = Path(f"{output}.jsonl") if output else None
    journal = Journal(path, {**key, "kbitcheck": VERSION, **machine.versions()})
    if journal.stale:
        say("the rows beside the output are of another sweep: starting anew")
    environment: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    complete = True
    try:
        chosen = _chosen(_architectures(task, echo), task, select, shard)
        todo = {name: cls for name, cls in chosen.items() if name not in journal.rows}
        if len(todo) < len(chosen):
            say(f"{len(chosen) - len(todo)} of {len(chosen)} rows are there already")
        pace = Pace(len(todo))
        with contextlib.closing(_rows(todo, task, template, jobs, timeout, environment, echo)) as rows:
            for done, finished in enumerate(rows, 1):
                journal.add(finished)
                left = f"; {pace.left(done)}" if pace.due() else ""
                number = len(chosen) - len(todo) + done
                say(f"{number}/{len(chosen)} {finished.architecture}: {finished.reason or 'audited'}{left}")
    except KeyboardInterrupt:
        complete = False
    finished_rows = [journal.rows[name] for name in chosen if name in journal.rows]
    return Table(
        task=task,
        selected=len(chosen),
        options={"command": command, **key},
        environment=environment or {"python": platform.python_version(), **machine.versions()},
        rows=[each for each in finished_rows if each.applies],
        complete=complete,
        left_out=sum(not each.applies for each in finished_rows),
    )


def _architectures(task: str, echo: Echo) -> Mapping[str, str]:
    """Class by model type: what the installed transformers has for a task. A worker looks: this process has no torch."""
    try:
        with contextlib.closing(answers(ListArchitectures(task=task), LISTING_SECONDS, echo)) as listing:
            return next(event.classes for event in listing if isinstance(event, Architectures))
    except StopIteration:
        raise Lost("the worker listed no architectures") from None
    except UsageError as error:
        raise Lost(str(error)) from error


def _chosen(classes: Mapping[str, str], task: str, select: Sequence[str], shard: tuple[int, int]) -> dict[str, str]:
    """The architectures that ``--select`` and ``--shard`` leave, sorted."""
    for pattern in select:
        if not fnmatch.filter(classes, pattern):
            hint = did_you_mean(pattern, classes)
            raise UsageError(f"transformers has no {task} model of type {pattern!r}{hint}")
    names = [n for n in sorted(classes) if not select or any(fnmatch.fnmatch(n, p) for p in select)]
    part, parts = shard
    # Neighbours, which resemble each other, go to different parts.
    return {name: classes[name] for name in names[part - 1 :: parts]}


def _rows(
    classes: Mapping[str, str],
    task: str,
    template: CaseSpec,
    jobs: int,
    timeout: float,
    environment: dict[str, Any],
    echo: Echo,
) -> Generator[Row, None, None]:
    """A row for each architecture, as they finish; ``environment`` is filled. All workers end with the generator."""

    def serve(worker: Worker, name: str) -> Iterator[Row]:
        spec = dataclasses.replace(template, model=f"arch:{task}/{name}")
        collector = Collector()
        try:
            for event in worker.examine(spec, select()):
                collector.add(event)
            environment.update(collector.loaded.environment)
            facts = collector.facts.get(spec.id)
            if facts is not None:
                yield row(name, classes[name], spec.model, collector.results, facts)
                return
            reason = next((r.reason for r in collector.results if r.status is Status.ERROR), "nothing was examined")
        except UsageError as error:
            if not worker.loaded:  # the implementation's fault, not this architecture's
                raise
            reason = error.cause or str(error)
        except Exception as error:
            reason = cause(error)
        options = tuple(f"{option}: " for option in template.quant.split(",")[1:])
        yield Row(
            architecture=name,
            cls=classes[name],
            model=spec.model,
            loads=False,
            reason=" ".join(reason.split()),
            applies=not reason.startswith(options),
        )

    with contextlib.ExitStack() as stack:
        scratch = [stack.enter_context(scratch_directory()) for _ in range(min(jobs, len(classes)))]
        workers = [Worker(directory, timeout, echo) for directory in scratch]
        yield from stack.enter_context(contextlib.closing(spread(list(classes), serve, workers)))


class Journal:
    """Rows on disk as they come, so that the same sweep can go on where it was interrupted.

    A JSON-lines file: what the rows depend on, then a row a line. One that was written under other options or versions is
    started anew.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path = path
        self.rows: dict[str, Row] = {}
        self.stale = False
        if path is None:
            return
        header = json.dumps({"key": key}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.stale = bool(lines) and lines[0] != header
        for line in [] if self.stale else lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last one may have been cut short
                kept = Row.from_json(json.loads(line))
                self.rows[kept.architecture] = kept
        whole = [header, *(json.dumps(dataclasses.asdict(r)) for r in self.rows.values())]
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def add(self, done: Row) -> None:
        """Keep a row, on disk before this returns."""
        self.rows[done.architecture] = done
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(done)) + "\n")
                file.flush()
                os.fsync(file.fileno())
