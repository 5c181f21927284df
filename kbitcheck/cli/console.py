"""What the command writes to stderr: lines, and how far a run is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kbitcheck.core.pace import Pace, duration

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


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


@contextlib.contextmanager
def progress(results: int | None, cases: int | None, *, quiet: bool = False) -> Iterator[Callable[[Event], None]]:
    """What shows how far a run is, of so many results and cases (None: nobody knows how many); yields the function that takes its events.

    On a terminal it is a bar, erased at the end; elsewhere a line now and then; if ``quiet``, nothing. Without ``results``, cases are counted.
    """
    if quiet:
        yield lambda event: None
        return
    from kbitcheck.core.events import Computing, Judged, Started

    place = _Place(results, cases)

    def take(event: Event) -> None:
        if isinstance(event, Started):
            place.begin(event.case)
        elif isinstance(event, Computing):
            place.compute(event.fact, event.left)
        elif isinstance(event, Judged):
            place.judged += 1

    if not sys.stderr.isatty():
        pace = Pace(place.total)

        def line(event: Event) -> None:
            take(event)
            if place.done != place.total and pace.due():
                say(f"{place.line}: {', '.join(filter(None, (pace.so_far, place.predicted or pace.left(place.done))))}")

        yield line
        return
    # rich takes long to import and is needed on a terminal alone.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=place.total, left="")

        def draw(event: Event) -> None:
            take(event)
            left = place.left and f"{place.left} in this case"
            bar.update(task, completed=place.done, description=_escaped(place.doing), left=left)

        yield draw


class _Place:
    """Where a run is: how many of ``total`` steps are done, its case, what that computes, and the time that is predicted for the rest of it."""

    def __init__(self, results: int | None, cases: int | None) -> None:
        self._results, self._cases, self._begun, self._case = results, cases, 0, ""
        self.judged, self.doing, self.left = 0, "starting", ""

    def begin(self, case: str) -> None:
        """A case begins."""
        self._begun += 1
        self._case = self.doing = case
        self.left = ""

    def compute(self, fact: str, left: float | None) -> None:
        """A fact of the case is computed; the case takes so many more seconds, if anything is predicted."""
        self.doing = f"{self._case}: {fact}"
        self.left = "" if left is None else f"about {duration(left)} left"

    @property
    def total(self) -> int | None:
        """The number of steps."""
        return self._cases if self._results is None else self._results

    @property
    def done(self) -> int:
        """The number of steps that are done."""
        return max(self._begun - 1, 0) if self._results is None else self.judged

    @property
    def predicted(self) -> str:
        """The time that is left, where the prediction of one case is that of the run."""
        return self.left if self._cases == 1 else ""

    @property
    def line(self) -> str:
        """The case, by its number."""
        of = f" of {self._cases}" if self._cases else ""
        return f"case {self._begun}{of}, {self._case}" if self._case else "starting"
