"""Entry point: every exception becomes one line on stderr and an exit code."""

import sys
import traceback
from collections.abc import Sequence

from kbitcheck.cli import app
from kbitcheck.cli.console import fail
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


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
