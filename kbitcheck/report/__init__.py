"""Reports as text, JSON, JUnit XML, SARIF, Markdown and HTML: one ``render(report) -> str`` a file."""

import io
import shutil
from importlib import import_module

from kbitcheck.core.report import Report
from kbitcheck.report.parts.verdict import verdict

__all__ = ["FORMATS", "render", "verdict"]

FORMATS = ("text", "json", "junit", "sarif", "markdown", "html")  # each but the first is a file here
PIPED_WIDTH = 110


def render(report: Report, form: str, *, verbose: bool = False, terminal: bool = False) -> str:
    """The report in one of ``FORMATS``; colours and the terminal's width only for a terminal."""
    if form != "text":
        text: str = import_module(f"kbitcheck.report.{form}").render(report)
        return text
    from kbitcheck.report import text as page

    if not terminal:
        return page.render(report, width=PIPED_WIDTH, verbose=verbose)
    from rich.console import Console

    width = max(shutil.get_terminal_size((PIPED_WIDTH, 0)).columns, 40)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, highlight=False, legacy_windows=False)
    page.show(report, console, verbose=verbose)
    return out.getvalue()
