"""Progress in a notebook: one output of the cell that is drawn anew while rules are judged, and is empty at the end."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from typing import Any

from kbitcheck.core.events import Computing, Event, Judged, Started

PAUSE = 0.1  # seconds between two drawings: a browser shows no more


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. Imports nothing: where IPython is not imported yet, it is none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextmanager
def notebook_progress(total: int) -> Iterator[Callable[[Event], None]]:
    """A bar over ``total`` results in the cell's output; yields the function that takes the events. Elsewhere it shows nothing."""
    if not in_notebook():
        yield lambda event: None
        return
    ipython = import_module("IPython.display")
    bar = _Bar(total)
    handle = ipython.display(ipython.HTML(bar.html), display_id=True)
    drawn = time.monotonic()

    def advance(event: Event) -> None:
        nonlocal drawn
        if bar.takes(event) and time.monotonic() - drawn >= PAUSE:
            drawn = time.monotonic()
            handle.update(ipython.HTML(bar.html))

    try:
        yield advance
    finally:
        handle.update(ipython.HTML(""))


class _Bar:
    """How many results there are, and what is going on."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._doing, self._start = total, 0, "starting", time.monotonic()

    def takes(self, event: Any) -> bool:
        """Take an event; whether it changes what is shown."""
        match event:
            case Started(case=case):
                self._doing = case
            case Computing(case=case, fact=fact, left=left):
                rest = "" if left is None else f", about {left:.0f} s left in this case"
                self._doing = f"{case}: {fact}{rest}"
            case Judged():
                self._done += 1
            case _:
                return False
        return True

    @property
    def html(self) -> str:
        """The bar as it stands, with a text for those who do not see it."""
        text = f"{self._done} of {self._total} · {self._doing} · {time.monotonic() - self._start:.0f} s"
        bar = f'<progress max="{max(self._total, 1)}" value="{self._done}" aria-label="kbitcheck" style="width:12rem"></progress>'
        return f'<div style="font-family:system-ui,sans-serif">{bar} <span>{escape(text)}</span></div>'
