"""The HTML report as a notebook shows it: in a frame, so that neither's style sheet changes the other."""

from html import escape

from kbitcheck.core.report import Report
from kbitcheck.report import html
from kbitcheck.report.parts.verdict import verdict

HEIGHT = 640  # pixels; a longer report scrolls


def render(report: Report) -> str:
    """A frame that holds the whole report and loads nothing."""
    style = "width:100%;border:1px solid #8888;border-radius:4px"
    page = escape(html.render(report))
    return f'<iframe title="{escape(verdict(report))}" style="{style}" height="{HEIGHT}" srcdoc="{page}"></iframe>'
