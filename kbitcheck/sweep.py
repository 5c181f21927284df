"""Audits every architecture of the installed transformers: one row each, several workers at once. No torch here."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import platform
import queue
import shlex
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import kbitcheck
from kbitcheck import environment, implementations, requirement
from kbitcheck.bench import Bench
from kbitcheck.core import (
    EXIT_BROKEN_RULE,
    EXIT_CONFORMS,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_NOTHING,
    Level,
    Party,
    Result,
    Rule,
    Status,
    UsageError,
    rules,
)
from kbitcheck.process import Lost, WorkerProcess
from kbitcheck.quantization import Quantization
from kbitcheck.suite import CaseSpec

if TYPE_CHECKING:
    from kbitcheck.options import SweepOptions

RETURNS, RUNS, LEARNS, CHANGED = "KB502", "KB210", "KB309", "KB105"
SUPPORTED, SWITCHED_ON, RECOMPUTES = "KB903", "KB401", "KB403"
LISTING_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule that a row breaks: its first failure, how many there are, and whose they are."""

    rule: str
    level: Level
    party: Party
    where: str
    actual: str
    failures: int

    @classmethod
    def of(cls, result: Result) -> Self:
        """The worst failure of a result: the implementation's own before others'."""
        first = next((f for f in result.failures if f.party is result.attributed_to), result.failures[0])
        return cls(
            rule=result.rule,
            level=result.level,
            party=first.party,
            where=first.where,
            actual=first.actual,
            failures=len(result.failures),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "level": Level(data["level"]), "party": Party(data["party"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of one architecture; None stands for what was not come to.

    ``quantized`` is the share of parameters (embeddings and head included) in quantized layers, ``growth`` bytes after
    preparing over bytes in half precision. ``reason`` says why a row is not audited, or not wholly; ``seconds`` is time
    inside rules.
    """

    architecture: str
    cls: str
    model: str
    loads: bool
    prepares: bool | None = None
    trains: bool | None = None
    checkpointing: str = ""
    quantized: float | None = None
    growth: float | None = None
    parameters: int | None = None
    adapters: int | None = None
    dead_adapters: int | None = None
    findings: tuple[Finding, ...] = ()
    errors: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def broken(self) -> bool:
        """Whether the model or the harness, and not what is under test, kept rules from being judged."""
        return not self.loads or bool(self.errors)

    @property
    def nonconforming(self) -> bool:
        """Whether the implementation itself breaks a MUST."""
        return any(f.level is Level.MUST and f.party is Party.IMPLEMENTATION for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        findings = tuple(Finding.from_json(f) for f in data["findings"])
        return cls(**{**data, "findings": findings, "errors": tuple(data["errors"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All rows of a sweep, sorted by architecture, with what was run and on what."""

    task: str
    selected: int
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Sequence[Row]
    complete: bool = True

    @property
    def exit_code(self) -> int:
        """0 where every row was audited and the implementation broke no MUST; see ``kbitcheck.core`` for the others."""
        if not self.complete:
            return EXIT_INTERRUPTED
        if not self.rows:
            return EXIT_NOTHING
        if any(row.broken for row in self.rows):
            return EXIT_ERROR
        return EXIT_BROKEN_RULE if any(row.nonconforming for row in self.rows) else EXIT_CONFORMS

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {**asdict(self), "exit_code": self.exit_code}


def row(architecture: str, cls: str, model: str, results: Sequence[Result], facts: Mapping[str, Any]) -> Row:
    """The row of an architecture that was loaded."""
    by_rule = {r.rule: r for r in results}
    raised = unprepared = next((f.actual for f in _failures(by_rule, RETURNS) if f.actual.startswith("raised")), "")
    total = facts.get("parameters")
    prepared = facts.get("bytes_prepared")
    # Where preparation or a training step raised, rules about what comes after have nothing to judge, and one has told.
    raised = raised or next((f.actual for f in _failures(by_rule, RUNS) if f.where == "training step"), "")
    errors = [r for r in results if r.status is Status.ERROR and not raised]
    return Row(
        architecture=architecture,
        cls=cls,
        model=model,
        loads=True,
        prepares=None if RETURNS not in by_rule else not unprepared,
        trains=False if raised and not unprepared else _trains(by_rule),
        checkpointing=_checkpointing(by_rule),
        quantized=facts["quantized"] / total if total else None,
        growth=prepared / (2 * total) if prepared and total else None,
        parameters=total,
        adapters=facts.get("adapters"),
        dead_adapters=facts.get("dead_adapters"),
        findings=tuple(Finding.of(r) for r in results if r.status is Status.FAIL),
        errors=tuple(f"{r.rule}: {r.reason}" for r in errors),
        reason=raised.removeprefix("raised ") or next((r.reason for r in errors), ""),
        seconds=round(sum(r.seconds for r in results), 2),
    )


def _failures(by_rule: Mapping[str, Result], rule: str) -> Iterable[Any]:
    return by_rule[rule].failures if rule in by_rule else ()


def _kept(by_rule: Mapping[str, Result], rule: str) -> bool | None:
    """Whether a rule holds; None where it was not judged."""
    found = by_rule.get(rule)
    return None if found is None or found.status in (Status.SKIP, Status.ERROR) else found.status is Status.PASS


def _trains(by_rule: Mapping[str, Result]) -> bool | None:
    """Whether the loss falls; where the float twin's does not either, whether every live adapter is changed."""
    learns = by_rule.get(LEARNS)
    return _kept(by_rule, CHANGED if learns is not None and learns.status is Status.SKIP else LEARNS)


def _checkpointing(by_rule: Mapping[str, Result]) -> str:
    if _kept(by_rule, SUPPORTED) is False:
        return "unsupported"
    judged = [kept for rule in (SWITCHED_ON, RECOMPUTES) if (kept := _kept(by_rule, rule)) is not None]
    return "" if not judged else "works" if all(judged) else "broken"


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
        if not lines or self.stale:
            path.write_text(header + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last one may have been cut short
                kept = Row.from_json(json.loads(line))
                self.rows[kept.architecture] = kept
        whole = [header, *(json.dumps(r.as_json()) for r in self.rows.values())]
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def add(self, done: Row) -> None:
        """Keep a row, on disk before this returns."""
        self.rows[done.architecture] = done
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done.as_json()) + "\n")
                file.flush()
                os.fsync(file.fileno())


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
                        done.put(_lost(name, classes[name], spec(name), f"{type(error).__name__}: {error}"))

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


def shard(names: Iterable[str], index: int, total: int) -> Iterator[str]:
    """Every ``total``-th name from the ``index``-th (from 1) on: neighbours, which are alike, go to different shards."""
    return (name for position, name in zip(count(), names, strict=False) if position % total == index - 1)


def swept(options: SweepOptions, *, say: Callable[[str], None], echo: Callable[[str], None] | None = None) -> Table:
    """Run what the options ask for; an interrupt ends it with ``complete=False`` and the rows so far.

    ``say`` is told each row as it comes.

    Raises:
        Lost: the architectures cannot be listed.
        UsageError: an option is wrong, or the implementation cannot be loaded.
    """
    implementation = options.prepare or implementations.default()
    implementations.validate(implementation)
    if requirement.parse(implementation):
        raise UsageError(f"--prepare {implementation}: a sweep is of the transformers that is installed here")
    environment.validate_device(options.device)
    quant = str(Quantization.parse(options.quant))
    common: dict[str, Any] = {"checkpointing": options.checkpointing, "profile": options.profile, "seed": options.seed}
    key = {"task": options.task, "quant": quant, "prepare": implementation, "device": options.device, **common}
    journal = Journal(
        Path(f"{options.output}.jsonl") if options.output else None,
        {**key, "kbitcheck": kbitcheck.__version__, **environment.versions()},
    )
    if journal.stale:
        say("the rows beside the output are of another sweep: starting anew")

    def spec(name: str) -> CaseSpec:
        model = f"arch:{options.task}/{name}"
        return CaseSpec(model=model, quant=quant, implementation=implementation, device=options.device, **common)

    told: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    complete = True
    try:
        chosen = _chosen(architectures(options.task, echo), options)
        todo = {name: cls for name, cls in chosen.items() if name not in journal.rows}
        if len(todo) < len(chosen):
            say(f"{len(chosen) - len(todo)} of {len(chosen)} rows are there already")
        rows = examine(
            todo, spec, list(rules().values()), jobs=options.jobs, timeout=options.timeout,
            on_environment=told.update, echo=echo,
        )  # fmt: skip
        with contextlib.closing(rows):
            for number, found in enumerate(rows, len(chosen) - len(todo) + 1):
                journal.add(found)
                say(f"{number}/{len(chosen)} {found.architecture}: {found.reason or 'audited'}")
    except KeyboardInterrupt:
        complete = False
    return Table(
        task=options.task,
        selected=len(chosen),
        options={"command": _command(options), **key},
        environment=told or {"python": platform.python_version(), **environment.versions()},
        rows=[journal.rows[name] for name in sorted(chosen) if name in journal.rows],
        complete=complete,
    )


def _chosen(classes: Mapping[str, str], options: SweepOptions) -> dict[str, str]:
    """The architectures that ``--select`` and ``--shard`` leave, sorted.

    Raises:
        UsageError: a name or pattern that matches none.
    """
    for pattern in options.select:
        if not fnmatch.filter(classes, pattern):
            close = get_close_matches(pattern, classes, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(f"transformers has no {options.task} model of type {pattern!r}{hint}")
    names = [n for n in sorted(classes) if not options.select or any(fnmatch.fnmatch(n, p) for p in options.select)]
    return {name: classes[name] for name in shard(names, *options.part)}


def _command(options: SweepOptions) -> str:
    """The command that makes the same table again."""
    words = ["kbitcheck", "sweep", "--task", options.task]
    words += [word for name in options.select for word in ("--select", name)]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ("quant", "checkpointing", "prepare", "profile", "shard", "seed") and value != field.default:
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)
