"""A progress bar on a terminal's stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Advance = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def shown(total: int) -> Iterator[Advance]:
    """Show a bar over ``total`` results, erased at the end; yields the function that takes the run's events.

    Where stderr is no terminal nothing is shown.
    """
    if not sys.stderr.isatty():
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=total)

        def advance(event: dict[str, Any]) -> None:
            if event["event"] == "case":
                progress.update(task, description=event["case"].replace("[", "\\["))
            elif event["event"] == "result":
                progress.update(task, advance=1)

        yield advance
