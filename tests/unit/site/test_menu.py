"""The menu of the docs site, and what keeps the site to itself. ``make docs`` builds it whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.scripts import DOCS, ROOT

CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def targets(nav: Any) -> Iterator[str]:
    for entry in nav if isinstance(nav, list) else [nav]:
        if isinstance(entry, dict):
            yield from targets(next(iter(entry.values())))
        elif isinstance(entry, list):
            yield from targets(entry)
        else:
            yield entry


def test_every_page_is_in_the_menu_and_every_entry_is_a_page(result_pages: dict[str, str]) -> None:
    listed = set(targets(CONFIG["nav"]))
    pages = [*DOCS.glob("*.md"), *DOCS.glob("sweep/*.md")]
    written = {page.relative_to(DOCS).as_posix() for page in pages} | {"examples/fork/README.md"}
    made = {"rules/index.md", "findings.md", "kill-matrix.md", "notebook.md"}
    made |= {path for path in result_pages if re.fullmatch(r"results/[^/]+\.md", path)}
    assert listed - made == written - {"matrix.md"}  # which is the first page of results for those who read the code
    assert made <= listed


LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)")


def test_every_link_of_a_page_leads_somewhere_in_a_clone() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("*/*.md")]
    links = {
        (page.relative_to(ROOT).as_posix(), link) for page in pages for link in LINK.findall(page.read_text("utf-8"))
    }
    dead = {(page, link) for page, link in links if not (ROOT / page).parent.joinpath(link).exists()}
    assert len(links) > 100
    # The site's first page, in whose place a clone has the README.
    assert dead == {("docs/index.md", "rules/index.md")}


def test_a_link_to_a_file_leads_to_the_page_that_the_site_makes_of_it(site: dict[str, ModuleType]) -> None:
    filled = site["other_pages"].filled
    assert filled("[a](findings/torchao_ddp.py)") == "[a](findings.md#torchao_ddp)"
    assert filled("[a](findings.toml), [b](kill-matrix)") == "[a](findings.md), [b](kill-matrix.md)"


def test_the_site_is_strict_and_fetches_no_font() -> None:
    assert (CONFIG["strict"], CONFIG["theme"]["font"]) == ("true", "false")


@pytest.mark.parametrize(
    ("page", "refused"),
    [
        ('<script src="https://a.example/x.js"></script>', True),
        ("<script async src=//a.example/x.js></script>", True),
        ('<link rel="stylesheet" href="https://a.example/x.css">', True),
        ("<style>a { background: url(https://a.example/x.png) }</style>", True),
        ('<style>@import "//a.example/x.css";</style>', True),
        ('<img alt="x" src="http://a.example/x.png">', True),
        ('<a href="https://a.example/">x</a>', False),
        ('<link rel="canonical" href="https://a.example/">', False),
        ('<script src="assets/x.js"></script><img src="x.png">', False),
    ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(tmp_path: Path, page: str, refused: bool) -> None:
    mkdocs = pytest.importorskip("mkdocs.exceptions", reason="needs the extra `docs`")
    sys.path.insert(0, str(DOCS / "site"))
    try:
        hooks = import_module("hooks")
    finally:
        sys.path.remove(str(DOCS / "site"))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "page.html").write_text(page)

    class Config:
        site_dir = str(tmp_path)

    if refused:
        with pytest.raises(mkdocs.PluginError, match=r"below/page\.html loads from elsewhere"):
            hooks.on_post_build(Config)
    else:
        hooks.on_post_build(Config)
