"""Judges each case once, whichever process of a test run asks for it first.

pytest-xdist may scatter the tests of a case over its workers. They share a directory: whoever needs a case first takes
its lock, judges it and leaves the outcome there as JSON; whoever needs it meanwhile judges a case that is still to come
instead of waiting. The system drops the lock of a worker that dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.events import Figures, Judged, Loaded
from kbitcheck.core.rule import rules
from kbitcheck.judge.conditions import settle
from kbitcheck.run import virtualenvs as environments
from kbitcheck.run.pool import Worker

Outcome = dict[str, Any]

PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """A case and the rules that it is judged by."""

    spec: CaseSpec
    rules: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of its files."""
        text = json.dumps([self.spec.as_json(), self.rules], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    @property
    def base(self) -> tuple[str, ...]:
        """What cases share that are loaded from the same quantized model."""
        return self.spec.implementation, self.spec.model, self.spec.quant


class Cases:
    """The cases of a test run, as one of its processes sees them.

    ``folder`` is shared by the processes; ``timeout`` is in seconds a case; ``path`` and ``environment`` are the
    worker's that runs the implementation.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Iterable[Job],
        *,
        timeout: float,
        path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._jobs = list(jobs)
        self._timeout, self._path, self._environment = timeout, path, environment
        self._known: dict[str, Outcome] = {}
        self._scratch = Path(tempfile.mkdtemp(prefix="worker-", dir=folder))
        self._worker: Worker | None = None
        self._subject = ""
        self._loaded: dict[str, Any] = {}
        self._base: tuple[str, ...] = ()

    def outcome(self, job: Job) -> Outcome:
        """The outcome of a case: ``results`` by rule, ``facts``, ``loaded`` (implementation and environment).

        ``usage`` says in one line what the user did wrong where the case could not be run at all.
        """
        while (found := self._saved(job)) is None:
            if not self._judged(job) and not any(self._judged(other) for other in self._ahead(job)):
                time.sleep(PAUSE_SECONDS)
        return found

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _ahead(self, waiting: Job) -> list[Job]:
        """What to judge while another process is at ``waiting``: where this one has a model loaded, it stays."""
        todo = [job for job in self._jobs if self._saved(job) is None]
        return sorted(todo, key=lambda job: (job.base != self._base, job.base == waiting.base))

    def _judged(self, job: Job) -> bool:
        """Judge a case unless another process is at it; whether its outcome is there."""
        with self._locked(job) as mine:
            if mine and self._saved(job) is None:
                self._save(job, self._judge(job))
        return mine

    def _judge(self, job: Job) -> Outcome:
        self._base = job.base
        outcome: Outcome = {"results": {}, "facts": None, "usage": ""}
        known = rules()
        try:
            for event in self._worker_for(job.spec).examine(job.spec, [known[code] for code in job.rules]):
                if isinstance(event, Judged):
                    result = settle(event.result, job.spec.implementation)
                    outcome["results"][result.rule] = result.as_json()
                elif isinstance(event, Figures):
                    outcome["facts"] = event.facts
                elif isinstance(event, Loaded):
                    self._loaded = {"implementation": event.implementation, "environment": event.environment}
        except UsageError as error:
            outcome["usage"] = str(error)
        return {**outcome, "loaded": self._loaded}

    def _worker_for(self, spec: CaseSpec) -> Worker:
        if self._worker is None or self._subject != spec.implementation:
            self.close()
            self._subject, self._loaded = spec.implementation, {}
            python = environments.interpreter(spec.implementation)
            # What pytest imports from would come before what the subject brings.
            path = self._path if python == sys.executable else ()
            environment = self._environment
            self._worker = Worker(self._scratch, self._timeout, path=path, environment=environment, python=python)
        return self._worker

    @contextmanager
    def _locked(self, job: Job) -> Iterator[bool]:
        with (self._folder / f"{job.key}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _saved(self, job: Job) -> Outcome | None:
        if job.key not in self._known:
            try:
                text = (self._folder / f"{job.key}.json").read_text(encoding="utf-8")
            except FileNotFoundError:
                return None
            self._known[job.key] = json.loads(text)
        return self._known[job.key]

    def _save(self, job: Job, outcome: Outcome) -> None:
        write(self._folder / f"{job.key}.json", outcome)


def write(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(data), encoding="utf-8")
    draft.replace(path)
