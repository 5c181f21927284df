"""``kbitcheck selftest``."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from kbitcheck.cli.console import echo, fail, say
from kbitcheck.cli.options import above_zero, option, split_codes
from kbitcheck.cli.signals import signals_as_interrupts
from kbitcheck.core.errors import Lost
from kbitcheck.core.events import FaultTried
from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS, EXIT_ERROR, EXIT_NOTHING, EXIT_USAGE
from kbitcheck.core.rule import select
from kbitcheck.report.output_file import OutputFile
from kbitcheck.report.tables.kill_matrix import write
from kbitcheck.run.requests import TryFaults
from kbitcheck.run.worker_process import answers

VERDICTS = {True: "caught", False: "MISSED", None: "not run"}


@dataclass(frozen=True, kw_only=True)
class Options:
    select: str = option("Only these rules.", "", metavar="CODES")
    matrix: str = option(
        "Run every fault against every rule; write what each broke, one file a rule.", "", metavar="DIR"
    )
    timeout: float = option(
        "Time limit of one answer of the worker.", 3600, metavar="SECONDS", read=above_zero("seconds")
    )
    quiet: bool = option("Print the verdict alone, on one line.", False, short=["-q"])
    debug: bool = option("Show tracebacks and what the worker prints.", False)


def run(options: Options) -> int:
    """Run the faults of the rules and show that each is caught by its rule."""
    codes = [rule.code for rule in select(split_codes([options.select]), about=None)]
    output = OutputFile("")
    directory = Path(options.matrix)
    if options.matrix:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return fail(f"--matrix {directory}: {error.strerror}", EXIT_USAGE)
    faults: list[FaultTried] = []
    request = TryFaults(codes=tuple(codes), matrix=bool(options.matrix))
    events = answers(request, options.timeout, echo if options.debug else None)
    try:
        with signals_as_interrupts(), contextlib.closing(events):
            for event in events:
                if not isinstance(event, FaultTried):
                    continue
                verdict = VERDICTS[event.caught]
                line = f"{verdict}  {event.code}  {event.fault}  [{event.case}]  {event.reason}"
                if not options.quiet:
                    say(line) if options.matrix else output.write(line + "\n")
                faults.append(event)
    except Lost as lost:
        return fail(f"the selftest broke: {lost}", EXIT_ERROR)
    if options.matrix:
        write(directory, faults)
    caught = [event.caught for event in faults if event.caught is not None]
    summary = f"{sum(caught)} of {len(caught)} faults caught"
    output.write(f"{summary}\n") if options.quiet else say(summary)
    return EXIT_NOTHING if not caught else EXIT_CONFORMS if all(caught) else EXIT_BROKEN_RULE
