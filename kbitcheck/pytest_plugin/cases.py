"""Judges each case once, whichever process of a test run needs it first.

pytest-xdist may scatter the tests of a case over its workers. They share a directory: the process that needs a case
first locks it, judges it and leaves the outcome there; a process that needs it meanwhile judges another case instead of
waiting. The system releases the lock of a worker that dies.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kbitcheck.core.cases import REFERENCE, CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.events import Collector, Loaded
from kbitcheck.core.rule import rules
from kbitcheck.pytest_plugin.outcome import Outcome
from kbitcheck.report.output_file import replace_file
from kbitcheck.run.findings import settler
from kbitcheck.run.pool import Worker
from kbitcheck.run.virtualenvs import interpreter

PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """A case and the codes of the rules that judge it."""

    spec: CaseSpec
    rules: tuple[str, ...]

    @property
    def key(self) -> str:
        """The stem of its files in the shared directory."""
        text = json.dumps([self.spec.as_json(), self.rules], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    @property
    def base(self) -> tuple[str, ...]:
        """Equal for cases that start from the same quantized model."""
        return self.spec.implementation, self.spec.model, self.spec.quant


class Cases:
    """The cases of a test run, as one of its processes sees them.

    ``folder`` is shared by the processes; ``timeout`` is in seconds for each case; ``path`` and ``environment`` are those
    of the worker that runs the implementation.
    """

    def __init__(
        self, folder: Path, jobs: Sequence[Job], *, timeout: float, path: Sequence[str], environment: dict[str, str]
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._jobs = folder, jobs
        self._timeout, self._path, self._environment = timeout, path, environment
        self._outcomes: dict[str, Outcome] = {}
        self._scratch = Path(tempfile.mkdtemp(prefix="worker-", dir=folder))
        self._worker: Worker | None = None
        self._implementation = ""
        self._loaded = Loaded()
        self._base: tuple[str, ...] = ()

    def outcome(self, job: Job) -> Outcome:
        """The outcome of a case, judged here or by another process."""
        while (outcome := self._saved(job)) is None:
            if not self._try(job) and not any(self._try(other) for other in self._others(job)):
                time.sleep(PAUSE_SECONDS)
        return outcome

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _others(self, waiting: Job) -> list[Job]:
        """What to judge while another process judges ``waiting``: first cases of the model that is loaded here."""
        todo = [job for job in self._jobs if self._saved(job) is None]
        return sorted(todo, key=lambda job: (job.base != self._base, job.base == waiting.base))

    def _try(self, job: Job) -> bool:
        """Judge a case; False where another process is at it."""
        try:
            with FileLock(self._folder / f"{job.key}.lock", blocking=False):
                if self._saved(job) is None:
                    replace_file(self._file(job), self._judge(job).to_text())
        except Timeout:
            return False
        return True

    def _judge(self, job: Job) -> Outcome:
        self._base = job.base
        collector = Collector(settler([job.spec]))
        usage = ""
        try:
            worker = self._worker_for(job.spec)
            collector.loaded = self._loaded
            for event in worker.examine(job.spec, [rules()[code] for code in job.rules]):
                collector.add(event)
        except UsageError as error:
            usage = str(error)
        self._loaded = collector.loaded
        facts = collector.facts.get(job.spec.id, {})
        return Outcome(spec=job.spec, results=tuple(collector.results), facts=facts, loaded=self._loaded, usage=usage)

    def _worker_for(self, spec: CaseSpec) -> Worker:
        if self._worker is None or self._implementation != spec.implementation:
            self.close()
            self._implementation, self._loaded = spec.implementation, Loaded()
            python = interpreter(spec.implementation)
            # pytest's import path would come before the implementation's own packages.
            path = self._path if python == sys.executable else ()
            self._worker = Worker(
                self._scratch,
                self._timeout,
                path=path,
                environment=self._environment,
                python=python,
                beside_reference=spec.implementation != REFERENCE,
            )
        return self._worker

    def _file(self, job: Job) -> Path:
        return self._folder / f"{job.key}.json"

    def _saved(self, job: Job) -> Outcome | None:
        if job.key not in self._outcomes and self._file(job).exists():
            self._outcomes[job.key] = Outcome.from_text(self._file(job).read_text(encoding="utf-8"))
        return self._outcomes.get(job.key)
