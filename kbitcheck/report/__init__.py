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
    module = import_module(f"kbitcheck.report.{form}")
    if form != "text":
        return str(module.render(report))
    if not terminal:
        return str(module.render(report, width=PIPED_WIDTH, verbose=verbose))
    from rich.console import Console
    from rich.text import Text

    width = max(shutil.get_terminal_size((PIPED_WIDTH, 0)).columns, 40)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, highlight=False, legacy_windows=False)
    for line, style in module.lines(report, width=width, verbose=verbose):
        console.print(Text(line, style=style), soft_wrap=True)
    return out.getvalue()
