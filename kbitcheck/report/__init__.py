"""One pure ``render(report) -> str`` a file."""

from __future__ import annotations

import shutil
from importlib import import_module

from kbitcheck.core.report import Report

PIPED_WIDTH = 110


def render(report: Report, form: str, *, verbose: bool = False, terminal: bool = False) -> str:
    """The report in a format of ``kbitcheck --format``; colours and the terminal's width only for a terminal."""
    if form != "text":
        text: str = import_module(f"kbitcheck.report.{form}").render(report)
        return text
    from kbitcheck.report import text as page

    width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns if terminal else PIPED_WIDTH
    return page.render(report, width=max(width, 40), color=terminal, verbose=verbose)


def verdict(report: Report) -> str:
    """The one summary line."""
    from kbitcheck.report.parts.counts import Tally

    return Tally(report).line()
