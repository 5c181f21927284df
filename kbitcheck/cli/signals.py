"""Ends a run the same way for every signal that asks for it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise ``KeyboardInterrupt`` as Ctrl-C does.

    Later ones are ignored for good: the process is on its way out, and an impatient second Ctrl-C must not lose the
    partial report.
    """

    def stop(number: int, frame: object) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    # What the caller has us ignore (nohup, a background job) stays ignored.
    caught = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in caught}
    try:
        yield
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is stop:
                signal.signal(each, handler)
