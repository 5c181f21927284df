"""Entry point: every exception becomes one line on stderr and an exit code."""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from kbitcheck.cli import app
from kbitcheck.cli.console import fail
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE


def main() -> None:
    """Entry point of the console script."""
    code = run(sys.argv[1:])
    if sys.argv[1:2] == ["watch"]:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End at once: the watched script is over, and who waits for it need not wait while this process is taken apart, too."""
    for stream in (sys.stdout, sys.stderr):
        # There is no stream, its reader has gone, or it is closed.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit code and raises nothing."""
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return app.run(arguments)
    except UsageError as error:
        if debug:
            traceback.print_exc()
        return fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)", EXIT_ERROR)
