"""The modules that make the docs site's generated pages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

from tests.scripts import DOCS


@pytest.fixture(scope="package")
def site() -> Iterator[dict[str, ModuleType]]:
    """The modules in ``docs/site``, imported as MkDocs does."""
    sys.path.insert(0, str(DOCS / "site"))
    yield {
        name: import_module(name)
        for name in (
            "notebook_page",
            "rule_pages",
            "other_pages",
            "picture",
            "result_pages",
            "symptom_pages",
            "upstream",
        )
    }
    sys.path.remove(str(DOCS / "site"))


@pytest.fixture(scope="package")
def result_pages(site: dict[str, ModuleType]) -> dict[str, str]:
    return dict(site["result_pages"].pages())
