"""What the commands that yield a report or a table share: where it goes, in which colours, and the verdict on a line of its own."""

import os
from pathlib import Path
from typing import Protocol

from kbitcheck.cli.console import say
from kbitcheck.cli.options import ReportOptions
from kbitcheck.core.report import Report
from kbitcheck.report import render, verdict
from kbitcheck.report.output_file import OutputFile


class TableOptions(Protocol):
    """Options of a command that yields a table."""

    @property
    def quiet(self) -> bool: ...
    @property
    def output(self) -> str: ...
    @property
    def format(self) -> str: ...


def coloured(color: str, *, terminal: bool) -> bool:
    """Whether text is coloured: as ``--color`` says, and for ``auto`` as NO_COLOR and FORCE_COLOR do, else on a terminal."""
    if color != "auto":
        return color == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or terminal


def text_of(report: Report, options: ReportOptions, *, terminal: bool) -> str:
    """The report in the format that the options name."""
    color = coloured(options.color, terminal=terminal)
    return render(report, options.format, verbose=options.verbose, terminal=terminal, color=color)


# By what the name of a file ends with, the format that is expected in it.
SUFFIXES = {".html": "html", ".json": "json", ".md": "markdown", ".xml": "junit", ".sarif": "sarif"}


def say_if_text(name: str, form: str) -> None:
    """Say that a file whose name promises another format holds text."""
    expected = SUFFIXES.get(Path(name).suffix) if name and form == "text" else None
    if expected:
        say(f"{name} holds text: for {expected} pass --format {expected}")


def show_report(
    report: Report, options: ReportOptions, output: OutputFile, *, epilogue: str = "", says_verdict: bool = True
) -> None:
    """Write the report, and its verdict to stderr unless a terminal shows it already; under ``--quiet`` the verdict alone."""
    if not options.quiet or options.output:
        output.write(text_of(report, options, terminal=output.terminal) + epilogue)
        say_if_text(options.output, options.format)
    if options.quiet:
        OutputFile("").write(f"{verdict(report)}\n")
    elif says_verdict and not (output.terminal and options.format == "text"):
        say(verdict(report))


def show_table(text: str, summary: str, options: TableOptions, output: OutputFile) -> None:
    """Write a table; under ``--quiet`` the line that sums it up alone, and the table to ``--output`` where that is given."""
    if not options.quiet or options.output:
        output.write(text)
        say_if_text(options.output, options.format)
    if options.quiet:
        OutputFile("").write(f"{summary}\n")
