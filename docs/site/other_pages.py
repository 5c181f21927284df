"""Pages made of what stands elsewhere: the findings of README.md, a saved report, sources of rules."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import rule_pages

from kbitcheck.core.report import Report
from kbitcheck.core.rule import rules
from kbitcheck.report import text as terminal

ROOT = Path(__file__).parents[2]
SAMPLE = Path(__file__).with_name("sample.json")
WIDTH = 84  # columns of a block of code on a page
SHOWN = "<!-- the report of docs/site/sample.json -->"
ASKED = re.compile(r"<!-- (source|sabotage) of rule (KB\d{3}) -->")
ROW = re.compile(r"^\| (.*?) \| (.*?) \| (.*?) \| \[`[^`]*`\]\(docs/findings/(\w+)\.py\) \| (.*?) \|$", re.MULTILINE)


def findings(readme: str) -> str:
    """The README's section on findings, a heading and the script for each row of its table.

    Raises:
        ValueError: there is no such section, or its table is not as expected.
    """
    section = readme.split("\n## Findings\n")[1].split("\n## ")[0]
    rows = list(ROW.finditer(section))
    if len(rows) != len(list((ROOT / "docs" / "findings").glob("*.py"))):
        raise ValueError("README.md: not every script in docs/findings has its row in the table of findings")
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    out = ["# Findings\n", section[: table.start()].strip() + "\n"]
    out += [_finding(*row.groups()) for row in rows]
    out += ["## Over the recipes\n", section[table.end() :].strip() + "\n"]
    return "\n".join(out)


def _finding(told: str, whose: str, rule: str, script: str, upstream: str) -> str:
    source = (ROOT / "docs" / "findings" / f"{script}.py").read_text(encoding="utf-8").rstrip()
    rules = re.sub(r"KB\d{3}", r"[\g<0>](rules/\g<0>.md)", rule)
    return (
        f"## {told} {{ #{script} }}\n\nWhose: {whose}. Rule: {rules}. Upstream: {rule_pages.linked(upstream)}.\n\n"
        f'??? example "`docs/findings/{script}.py`"\n\n'
        + "".join(f"    {line}\n" if line else "\n" for line in f"```python\n{source}\n```".splitlines())
    )


def sample() -> Report:
    """The saved report that the pages show."""
    return Report.from_json(json.loads(SAMPLE.read_text(encoding="utf-8")))


def filled(text: str) -> str:
    """The page with what its comments ask for: the saved report as a terminal shows it, sources of rules and sabotage.

    Raises:
        KeyError: there is no such rule.
    """

    def source(found: re.Match[str]) -> str:
        kind, code = found.groups()
        if kind == "source":
            shown = inspect.getsource(rules()[code].check).rstrip()
        else:
            shown = "\n\n\n".join(example.source for example in rule_pages.examples()[code])
        return f"```python\n{shown}\n```"

    if SHOWN in text:
        text = text.replace(SHOWN, f"```text\n{terminal.render(sample(), width=WIDTH).rstrip()}\n```")
    return ASKED.sub(source, text)
