"""Templates of the formats that are markup, and how they are filled in."""

import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from markupsafe import Markup, escape

from kbitcheck.report.parts import markup
from kbitcheck.report.parts.limits import BRIEF, listed


@cache
def template(name: str) -> Template:
    """The template in ``NAME.jinja``. Values are escaped in HTML; in Markdown the template applies the filters."""
    environment = Environment(
        loader=PackageLoader("kbitcheck.report", "templates"),
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        cases=lambda number: f"{number} {'case' if number == 1 else 'cases'}",
        code=markup.code,
        html=markup.html,
        listed=lambda names: listed(names, BRIEF.cases),
        listed_code=lambda names: listed([markup.code(BRIEF.text(name)) for name in names], BRIEF.cases),
        html_prose=_html_prose,
        prose=markup.prose,
    )
    return environment.get_template(f"{name}.jinja")


@cache
def glossary() -> tuple[str, ...]:
    """The entries of the documentation's glossary, as Markdown without links."""
    package = Path(__file__).parents[2]  # an installed package brings the page along
    places = (package / "report" / "glossary.md", package.parent / "docs" / "glossary.md")
    text = next(path for path in places if path.is_file()).read_text(encoding="utf-8")
    _, *entries = re.sub(r" \(\[[^]]*\]\([^)]*\)\)", "", text).strip().split("\n\n")
    return tuple(" ".join(entry.split()) for entry in entries)


def _html_prose(text: str) -> Markup:
    """The text between backticks as code and between asterisks as strong; everything else in it stays text."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked))  # noqa: S704  (escaped before)
