"""Where the process is entered and left: exit codes, one line for an error, and what needs no command-line parser."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_CONFORMS, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from kbitcheck.core.rule import select


def main() -> None:
    """Entry point of the console script."""
    sys.exit(door(sys.argv[1:]))


def door(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code; whatever is raised becomes one line on stderr."""
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        # typer imports pydantic to take any argument at all; the two together take longer than all the rest.
        if arguments[:1] == ["rules"] and len(arguments) < 3 and not "".join(arguments[1:]).startswith("-"):
            return list_rules(*arguments[1:])
        return _parse(arguments)
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


def _parse(arguments: Sequence[str]) -> int:
    import typer

    from kbitcheck.cli.app import app

    try:
        code = app(arguments or ["--help"], prog_name="kbitcheck", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        told = error.format_message().rstrip(".")
        raise UsageError(f"{told}; see `{context.command_path if context else 'kbitcheck'} --help`") from error
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == 130:  # typer's answer to Ctrl-C
        raise KeyboardInterrupt
    return int(code or 0) if arguments else EXIT_USAGE


def list_rules(code: str = "") -> int:
    """Print the index of the rules, or the page of the one that ``code`` names."""
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.report import rule_page as pages

    found = select([code] if code else [])
    Destination("").write(pages.page(found[0]) if len(found) == 1 and code else pages.index(found))
    return EXIT_CONFORMS


def say(line: str) -> None:
    """Tell something on stderr, if anyone listens."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")


def fail(message: str, code: int) -> int:
    """Say what is wrong on one line; returns the code."""
    say("kbitcheck: " + " ".join(message.split()))
    return code
