"""What the command writes to stderr: lines, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kbitcheck.core.events import Event  # takes longer to import than all else of `--help`


def say(line: str) -> None:
    """Write a line to stderr; ignore a closed stream."""
    echo(f"{line}\n")


def echo(text: str) -> None:
    """Write text to stderr as it is; ignore a closed stream."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def fail(message: str, code: int) -> int:
    """Say on one line what is wrong; returns ``code``."""
    say("kbitcheck: " + " ".join(message.split()))
    return code


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


@contextlib.contextmanager
def progress_bar(total: int | None, *, quiet: bool = False) -> Iterator[Callable[[Event], None]]:
    """A bar over ``total`` results (None: nobody knows how many), erased at the end; yields the function that takes the events of a run.

    Nothing is shown where stderr is no terminal, and if ``quiet``.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda event: None
        return
    # rich takes long to import and is needed on a terminal alone.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from kbitcheck.core.events import Computing, Judged, Started

    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=total, left="")

        def advance(event: Event) -> None:
            if isinstance(event, Started):
                progress.update(task, description=_escaped(event.case), left="")
            elif isinstance(event, Computing):
                left = "" if event.left is None else f"about {duration(event.left)} left in this case"
                progress.update(task, description=_escaped(f"{event.case}: {event.fact}"), left=left)
            elif isinstance(event, Judged):
                progress.update(task, advance=1)

        yield advance
