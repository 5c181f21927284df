"""Reports as text, JSON, JUnit XML, SARIF, Markdown and HTML: one ``render(report) -> str`` a file."""

import io
import shutil
from importlib import import_module

from kbitcheck.core.report import Report
from kbitcheck.report.parts.verdict import verdict

__all__ = ["FORMATS", "render", "verdict"]

FORMATS = ("text", "json", "junit", "sarif", "markdown", "html")  # each but the first is a file here
PIPED_WIDTH = 110


def render(
    report: Report, form: str, *, verbose: bool = False, terminal: bool = False, color: bool | None = None
) -> str:
    """The report in one of ``FORMATS``; the text has the width of a ``terminal``, and ``color`` (by default on one)."""
    module = import_module(f"kbitcheck.report.{form}")
    if form != "text":
        return str(module.render(report))
    width = max(shutil.get_terminal_size((PIPED_WIDTH, 0)).columns, 40) if terminal else PIPED_WIDTH
    if not (terminal if color is None else color):
        return str(module.render(report, width=width, verbose=verbose))
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, no_color=False, highlight=False, legacy_windows=False)
    for line, style in module.lines(report, width=width, verbose=verbose):
        console.print(Text(line, style=style), soft_wrap=True)
    return out.getvalue()
