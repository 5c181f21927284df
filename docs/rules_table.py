"""Writes the table of rules in README.md from the registry; with ``--check`` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from kbitcheck.core.rule import rules

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- rules:start -->", "<!-- rules:end -->"


def table() -> str:
    """One line a rule: code, name, level and the first sentence of the requirement."""
    lines = ["| code | name | level | requirement |", "|---|---|---|---|"]
    for rule in rules().values():
        requirement = rule.requirement.split(". ")[0].removesuffix(".").replace("|", "\\|")
        lines.append(f"| {rule.code} | {rule.name} | {rule.level.value} | {requirement} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The text with the table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the table, or with ``--check`` return 1 where it has drifted."""
    text = README.read_text(encoding="utf-8")
    fresh = filled(text)
    if "--check" in arguments:
        if text != fresh:
            print("README.md: the table of rules has drifted; run `python docs/rules_table.py`", file=sys.stderr)
        return int(text != fresh)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
