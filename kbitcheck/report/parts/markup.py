"""Markdown: tables, code, and prose in which nothing becomes markup by accident."""

import re
from collections.abc import Iterable, Sequence
from html import escape

SPECIAL = re.compile(r"([\\*_{}\[\]()#+!~])")


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table whose cells are Markdown."""
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    # Pipes split a cell before code is looked for.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def code(text: str) -> str:
    """A code span of one line, in which nothing is markup, a mention or a link."""
    text = printable(" ".join(text.split()))
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def prose(text: str) -> str:
    """Words of our own, which may hold code between backticks; everything else in them is literal."""
    words, *rest = re.split(r"`([^`]+)`", text)
    out = [_literal(words)]
    for span, words in zip(rest[::2], rest[1::2], strict=True):
        out += [code(span), _literal(words)]
    return "".join(out)


def _literal(text: str) -> str:
    return html(SPECIAL.sub(r"\\\1", text).replace("`", "\\`"))


def html(text: str) -> str:
    """Text that holds no tag and no entity."""
    return escape(text, quote=False)


def printable(text: str) -> str:
    """The text with a replacement character for each that a terminal would act on."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
