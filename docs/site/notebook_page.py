"""``docs/notebook.ipynb`` as a page: its cells, and what came out when the site's build ran them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "notebook.ipynb"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell that ran: what it printed, and the value of its last line."""

    source: str
    code: bool
    printed: str = ""
    value: Any = None

    @property
    def page(self) -> str:
        """The cell as Markdown, with its outputs."""
        if not self.code:
            return self.source
        html = getattr(self.value, "_repr_html_", None)
        shown = "" if self.value is None or html else repr(self.value)
        text = "\n".join(filter(None, [self.printed.rstrip(), shown]))
        blocks = [f"```python\n{self.source}\n```"] + ([f"```text\n{text}\n```"] if text else [])
        return "\n\n".join(blocks + ([f"<div>{html()}</div>"] if html else []))


def cells() -> Iterator[Cell]:
    """The cells, each after it ran; all code shares one module, as in a notebook."""
    module = ModuleType("__notebook__")
    sys.modules[module.__name__] = module  # a function's module is looked up by name
    try:
        for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
            source = "".join(cell["source"])
            yield _ran(source, f"<cell {number}>", vars(module)) if cell["cell_type"] == "code" else Cell(source, False)
    finally:
        del sys.modules[module.__name__]


def _ran(source: str, name: str, names: dict[str, Any]) -> Cell:
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # reports quote sources
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(tree, name, "exec"), names)  # noqa: S102 - the notebook is this repository's own
        value = eval(compile(ast.Expression(last.value), name, "eval"), names) if last else None  # noqa: S307
    return Cell(source, True, out.getvalue(), value)


def page() -> str:
    """The notebook's page."""
    return "\n\n".join(cell.page for cell in cells()) + "\n"
