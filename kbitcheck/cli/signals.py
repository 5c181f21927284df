"""One way to end a run, whichever signal asks for it."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise ``KeyboardInterrupt`` as Ctrl-C does.

    Later signals are ignored for good: the process is about to end, and an impatient second Ctrl-C must not lose the
    partial report.
    """

    def stop(number: int, frame: object) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    # A signal that the caller ignores (nohup, a background job) stays ignored.
    caught = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in caught}
    try:
        yield
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is stop:
                signal.signal(each, handler)
