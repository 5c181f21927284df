"""What is public is documented, and nothing else is."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

import kbitcheck

ROOT = Path(kbitcheck.__file__).parents[1]
PUBLIC = (
    "kbitcheck", "kbitcheck.integrations.transformers", "kbitcheck.testing", "kbitcheck.strategies", "kbitcheck.extend",
    "kbitcheck.reference",
)  # fmt: skip
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def documented(page: str) -> dict[str, set[str]]:
    """The names that a page documents, by module."""
    blocks = re.findall(r"^::: ([\w.]+)\n((?: .*\n?)*)", page, re.MULTILINE)
    return {module: set(re.findall(r"\w+", options.partition("members:")[2])) for module, options in blocks}


def test_the_page_documents_the_public_modules() -> None:
    assert set(documented(PAGE)) == set(PUBLIC)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_the_documented_names(module: str) -> None:
    public = set(import_module(module).__all__) - {"__version__"}
    assert public == documented(PAGE)[module]
    assert all(getattr(import_module(module), name) is not None for name in public)


def test_documented_reads_both_forms_of_a_list() -> None:
    page = "::: a.b\n    options:\n      members: [x, y]\n\ntext\n\n::: c\n    options:\n      members:\n        - z\n"
    assert documented(page) == {"a.b": {"x", "y"}, "c": {"z"}}


def test_examples_import_public_modules_alone() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    examples = {
        page.name: re.findall(r"```python.*?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in pages
    }
    private = [
        f"{page}: {line}"
        for page, blocks in examples.items()
        for block in blocks
        for line in re.findall(r"^\s*((?:from|import) kbitcheck[\w.]*(?: import .+)?)$", block, re.MULTILINE)
        if line.split()[1] not in PUBLIC
    ]
    assert any(examples.values())
    assert private == []


def test_the_reference_is_the_whole_package() -> None:
    assert import_module("kbitcheck.reference").__all__ == import_module("kbitcheck_reference").__all__


def test_the_reference_is_one_import_away() -> None:
    found = import_module("kbitcheck.reference").prepare_model_for_kbit_training
    assert found.__module__ == "kbitcheck_reference.prepare"
