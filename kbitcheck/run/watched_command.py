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
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.run import ranks
from kbitcheck.run.inject import __file__ as inject
from kbitcheck.run.watch_settings import Settings

VARIABLE = "KBITCHECK_WATCH"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PAUSE = 0.25  # seconds between looks for reports


class Ended(NamedTuple):
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
        # A wait with a timeout would sleep for up to 50 ms after the command has ended.
        ending = threading.Thread(target=process.wait, daemon=True)
        ending.start()
        with _forwarding(process):
            while ending.is_alive():
                ending.join(PAUSE)
                if not shown and (each := ranks.read(folder)) and len(each) >= each[0].ranks:
                    shown = True
                    on_report(ranks.merged(each, settings))
        report = ranks.merged(ranks.read(folder), settings)
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
