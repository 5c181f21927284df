"""Runs a user's command with the watcher inside, and gathers the reports of its processes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.version import TOOL
from kbitcheck.run.inject import __file__ as inject
from kbitcheck.run.watch_settings import Settings

VARIABLE = "KBITCHECK_WATCH"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PAUSE = 0.25  # seconds between looks for reports


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code as a shell has it, the report, and why there is none, on one line each."""

    code: int
    report: Report
    failed: str = ""


def run(command: Sequence[str], settings: Settings, *, on_report: Callable[[Report], None]) -> Ended:
    """Run a command unchanged. ``on_report`` gets the report when every process has taken its steps, or at the end.

    Raises:
        UsageError: an option is wrong, or the command cannot be run.
    """
    settings.validate()
    with tempfile.TemporaryDirectory(prefix="kbitcheck-watch-") as name:
        folder = Path(name)
        try:
            process = subprocess.Popen(list(command), env=_environment(folder, settings))
        except OSError as error:
            raise UsageError(f"cannot run {command[0]}: {error.strerror}") from None
        shown = False
        with _forwarding(process):
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PAUSE)
                if not shown and (reports := _reports(folder)) and len(reports) >= _ranks(folder):
                    shown = True
                    on_report(_merged(reports, settings))
        report = _merged(_reports(folder), settings)
        failed = "; ".join({path.read_text(encoding="utf-8"): None for path in sorted(folder.glob("failed-*"))})
    if not shown and report.results:
        on_report(report)
    code = process.returncode
    return Ended(128 - code if code < 0 else code, report, failed)


def _environment(folder: Path, settings: Settings) -> dict[str, str]:
    """The command's environment: as it is, with the watcher on Python's path."""
    # To import the second one would import torch.
    specs = (importlib.util.find_spec(name) for name in ("kbitcheck", "kbitcheck_reference"))
    paths = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin]
    options = {
        "folder": str(folder),
        "settings": dataclasses.asdict(settings),
        "paths": list(dict.fromkeys(paths)),
    }
    own = str(Path(inject).parent)
    path = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, VARIABLE: json.dumps(options)}


def _reports(folder: Path) -> list[Report]:
    return [Report.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def _ranks(folder: Path) -> int:
    """The number of processes that train, as the first report says."""
    first = next(iter(sorted(folder.glob("*.json"))))
    return int(json.loads(first.read_text(encoding="utf-8"))["subject"].get("ranks", 1))


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on to the command. Ctrl-C on a terminal reaches the command by itself."""

    def forward(number: int, frame: object) -> None:
        if number != signal.SIGINT or not os.isatty(0):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    before = {each: signal.signal(each, forward) for each in FORWARDED if signal.getsignal(each) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _merged(reports: Sequence[Report], settings: Settings) -> Report:
    """One report of all ranks' reports, whose cases are named apart already; of none the report of a run without a quantized model."""
    if not reports:
        subject = {
            "command": "watch",
            "ignored": dict(settings.ignore),
            "steps": 0,
            "implementation": {"name": "your code"},
        }
        return Report(tool=TOOL, environment={}, subject=subject, results=(), blame="own")
    first = reports[0]
    cases: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for report in reports:
        cases |= report.subject.get("cases", {})
        facts |= report.facts.get("cases", {})
    return Report(
        tool=first.tool,
        environment=first.environment,
        subject={**first.subject, "cases": cases},
        results=tuple(result for report in reports for result in report.results),
        blame=first.blame,
        strict=settings.strict,
        complete=all(report.complete for report in reports),
        facts={"cases": facts, "seconds": max(report.facts.get("seconds", 0.0) for report in reports)},
    )
