"""One pure ``render(report) -> str`` a file."""

from __future__ import annotations

import shutil

from kbitcheck.core import Report

PIPED_WIDTH = 110


def render(report: Report, form: str, *, verbose: bool = False, terminal: bool = False) -> str:
    """The report in a format of ``kbitcheck.options.FORMATS``; colours and the terminal's width only for a terminal."""
    if form == "json":
        from kbitcheck.reporters import json

        return json.render(report)
    from kbitcheck.reporters import text

    width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns if terminal else PIPED_WIDTH
    return text.render(report, width=max(width, 40), color=terminal, verbose=verbose)


def verdict(report: Report) -> str:
    """The one summary line."""
    from kbitcheck.reporters.tally import Tally

    return Tally(report).line()
