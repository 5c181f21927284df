"""What pages of results have in common: the JSON files that they are made of, and tables that a reader sorts and filters."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from kbitcheck.report.parts.sortable import Sortable
from kbitcheck.report.templates import template

RESULTS = Path(__file__).parents[2] / "results"


@cache
def read(name: str) -> Any:
    """What is in a file of ``results/``."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def sortable(contents: Sortable, name: str) -> str:
    """The table as HTML that Markdown leaves as it is; ``name`` is its id on the page."""
    drawn = template("macros.html").module.sortable(contents, name)  # type: ignore[attr-defined]
    lines = [line for line in str(drawn).splitlines() if line.strip()]
    return "\n".join(['<section class="results">', *lines, "</section>"])
