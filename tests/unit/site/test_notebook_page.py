"""The notebook of the docs, which is run when the site is built."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import DOCS


def test_the_notebook_runs_and_its_page_shows_what_came_out(site: dict[str, ModuleType]) -> None:
    cells = [cell for cell in site["notebook_page"].cells() if cell.code]
    audited, findings, broken, data = cells[1].value, *cells[2:5]
    assert audited.exit_code == findings.value == 0
    assert findings.printed.count("\n") == len(audited.findings) > 0
    assert "✗ KB201 norms-fp32" in broken.page
    assert "Again: kbitcheck.check_implementation(prepare, " in broken.page
    assert data.printed.startswith("1 {'pass': ")
    assert ("KB201", "bfloat16") in data.value
    assert re.search(r'\n```\n\n<div><iframe title="✓ ready: [^>]* srcdoc="&lt;!doctype', cells[1].page)
    assert "```text\nLinear4bit(in_features=64, out_features=128, bias=False)\n```" in cells[0].page


def test_a_cell_that_raises_stops_the_build(
    site: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = {
        "cells": [{"cell_type": "markdown", "source": ["# A\n", "b"]}, {"cell_type": "code", "source": ["1 / 0"]}]
    }
    monkeypatch.setattr(site["notebook_page"], "NOTEBOOK", tmp_path / "a.ipynb")
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    cells = site["notebook_page"].cells()
    assert next(cells).page == "# A\nb"
    with pytest.raises(ZeroDivisionError):
        next(cells)
    assert "__notebook__" not in sys.modules


def test_the_notebook_is_kept_without_outputs() -> None:
    """They would be of another day; the site's build makes them anew."""
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    assert (notebook["nbformat"], len(code)) == (4, 6)
