"""What the command writes to stderr: lines, and a progress bar on a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from kbitcheck.core.events import Event, Judged, Started


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


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[Event], None]]:
    """A bar over ``total`` results, erased at the end; yields the function that takes the events of a run.

    Nothing is shown where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield lambda event: None
        return
    # rich takes long to import and is needed on a terminal alone.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=total)

        def advance(event: Event) -> None:
            if isinstance(event, Started):
                progress.update(task, description=event.case.replace("[", "\\["))
            elif isinstance(event, Judged):
                progress.update(task, advance=1)

        yield advance
