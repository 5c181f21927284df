"""What MkDocs calls: adds the generated pages and their places in the menu, and refuses pages that load from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import notebook_page
import other_pages
import result_pages
import rule_pages
import symptom_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from kbitcheck.core.rule import rules
from kbitcheck.report import render
from kbitcheck.report.rule_page import FAMILIES
from kbitcheck.report.tables import kill_matrix

RULES = "rules/index.md"  # the entry of the menu that the rules' pages take their places under
# What a browser fetches by itself; a link that is followed by hand is none.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b(?![^>]*\brel=["']?(?:canonical|alternate|next|prev))[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
    r"""|@import\s[^;]*//|url\(["']?(?:https?:)?//[^)]*\)""",
    re.IGNORECASE,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a menu of rules, by family, where the list of rules stands."""
    assert config.nav is not None
    config.nav = [_opened(entry) for entry in config.nav]
    return config


def _opened(entry: Any) -> Any:
    title, target = next(iter(entry.items()))
    if target != RULES:
        return entry
    families: dict[str, list[dict[str, str]]] = {}
    for code, rule in rules().items():
        family = FAMILIES.get(rule.family, rule.family)
        families.setdefault(family, []).append({f"{code} {rule.name}": f"rules/{code}.md"})
    return {title: [RULES, *({family: pages} for family, pages in families.items())]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not committed."""
    made = {
        **dict(rule_pages.pages()),
        **dict(symptom_pages.pages()),
        **dict(result_pages.pages()),
        "kill-matrix.md": kill_matrix.page(kill_matrix.read(other_pages.ROOT / "docs" / "kill-matrix")),
        "findings.md": other_pages.findings(),
        "notebook.md": notebook_page.page(),
        "sample-report.html": render(other_pages.sample(), "html"),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page asks for."""
    return other_pages.filled(markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Look at every page and style sheet.

    Raises:
        PluginError: one makes a browser fetch something from another place.
    """
    built = Path(config.site_dir)
    for path in sorted([*built.rglob("*.html"), *built.rglob("*.css")]):
        if match := LOADED.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.relative_to(built)} loads from elsewhere: {match[0]}")
