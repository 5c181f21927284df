"""The rules themselves, for ``kbitcheck rules``."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from kbitcheck.core.rule import Rule


def index(rules: Sequence[Rule]) -> str:
    """One line a rule, by family."""
    width = max((len(rule.name) for rule in rules), default=0)
    lines: list[str] = []
    family = ""
    for rule in rules:
        if rule.family != family:
            family = rule.family
            lines += [*([""] if lines else []), family]
        lines.append(f"  {rule.code}  {rule.level.value:6}  {rule.name:{width}}  {_sentence(rule.requirement)}")
    return "\n".join(lines) + "\n"


def page(rule: Rule) -> str:
    """Everything there is to know about one rule."""
    width = min(shutil.get_terminal_size((110, 0)).columns, 110)
    blocks = [f"{rule.code} {rule.name} ({rule.level.value}, {rule.family})", _wrapped(rule.requirement, width)]
    for heading, title in (("Why", "Why"), ("Symptom", "You will see"), ("Fix", "Do"), ("Sources", "Sources")):
        if text := rule.section(heading):
            blocks.append(_wrapped(f"{title}: {text}", width))
    return "\n\n".join(blocks) + "\n"


def _sentence(text: str) -> str:
    return text.split(". ")[0].removesuffix(".")


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
