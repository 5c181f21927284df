"""Pages made from other files: the findings, a saved report, sources of rules."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import rule_pages

from kbitcheck.core.report import Report
from kbitcheck.core.rule import rules
from kbitcheck.report import text as terminal
from kbitcheck.report.parts.examples import examples

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / "docs" / "findings.toml"
SCRIPTS = ROOT / "docs" / "findings"
PACKAGE = ROOT / "kbitcheck"
SAMPLE = Path(__file__).with_name("sample.json")
WIDTH = 84  # columns of a block of code on a page
HEAD = """# Findings

Defects that the rules found in torch 2.13.0, transformers 5.23.0, bitsandbytes 0.50.2 and PEFT 0.21.2. Each has a script of
at most 30 lines that needs no `kbitcheck`: it exits 0 while the defect is there, and 1 once it is gone.

Over the ten recipes in nf4, fp4 and int8, each with reentrant and non-reentrant checkpointing and without, the reference
breaks nothing, also under `--strict`. PEFT 0.21.2 keeps every MUST; the SHOULDs that it breaks are the first five findings.
The report of a run names the other findings too, and attributes them to the stack or the model, not to the preparation.
"""
SHOWN = "<!-- the report of docs/site/sample.json -->"
ASKED = re.compile(r"<!-- (source|sabotage) of rule (KB\d{3}) -->")
# In a clone, pages link to the files that the site makes pages of.
MADE = {
    r"findings\.toml": "findings.md",
    r"findings/(\w+)\.py": r"findings.md#\1",
    "kill-matrix": "kill-matrix.md",
    r"site/sample\.json": "sample-report.html",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """An entry of ``docs/findings.toml``: a defect, who is responsible, and the script that shows it."""

    script: str
    title: str
    party: str
    rules: str
    upstream: str = "none known"
    detail: str = ""
    report: Mapping[str, str] = field(default_factory=dict)  # what `docs/site/upstream.py` makes a report of

    @property
    def section(self) -> str:
        """Heading, facts and script, as Markdown."""
        source = (SCRIPTS / f"{self.script}.py").read_text(encoding="utf-8").rstrip()
        rules = re.sub(r"KB\d{3}", r"[\g<0>](rules/\g<0>.md)", self.rules)
        facts = f"Attributed to: {self.party}. Rules: {rules}. Upstream: {rule_pages.linked(self.upstream)}."
        if self.report:
            facts += f" Nobody has reported it: [a report ready to be filed](findings/{self.script}.md)."
        for party, codes in excused_rules().get(self.script, {}).items():
            facts += f" Not counted against {party} under {', '.join(f'[{code}](rules/{code}.md)' for code in codes)}."
        block = "".join(f"    {line}\n" if line else "\n" for line in f"```python\n{source}\n```".splitlines())
        parts = [f"## {self.title} {{ #{self.script} }}", self.detail, facts]
        return "\n\n".join(filter(None, parts)) + f'\n\n??? example "`docs/findings/{self.script}.py`"\n\n{block}'


def committed_findings() -> list[Finding]:
    """The entries of ``docs/findings.toml``, in its order."""
    entries = tomllib.loads(FINDINGS.read_text(encoding="utf-8"))["finding"]
    return [Finding(**entry) for entry in entries]


def excused_rules() -> Mapping[str, Mapping[str, list[str]]]:
    """By script: whom a record in the package excuses (the reference, or any implementation), and under which rules."""
    rules: dict[str, dict[str, list[str]]] = {}
    for path in sorted(PACKAGE.rglob("findings.toml")):
        for record in tomllib.loads(path.read_text(encoding="utf-8"))["finding"]:
            party = "the reference" if record.get("decides_model", True) else "any implementation or model"
            codes = rules.setdefault(Path(record["script"]).stem, {}).setdefault(party, [])
            codes += [record["rule"]] if record["rule"] not in codes else []
    return rules


def findings() -> str:
    """The page of findings: a section for each script.

    Raises:
        ValueError: scripts and entries do not pair, or a record of the package has no entry.
    """
    entries = committed_findings()
    scripts = {path.stem for path in SCRIPTS.glob("*.py")}
    if {entry.script for entry in entries} != scripts:
        raise ValueError(
            "docs/findings.toml: not every script in docs/findings has its entry, or an entry has no script"
        )
    if missing := set(excused_rules()) - scripts:
        raise ValueError(f"no script in docs/findings: {', '.join(sorted(missing))}")
    return "\n".join([HEAD, *(entry.section for entry in entries)])


def sample() -> Report:
    """The saved report that the pages show."""
    return Report.from_json(json.loads(SAMPLE.read_text(encoding="utf-8")))


def filled(text: str) -> str:
    """The page with what its comments ask for, and with links to the pages that the site makes.

    Comments ask for the saved report as a terminal shows it, and for sources of rules and sabotage.

    Raises:
        KeyError: there is no such rule.
    """

    def source(match: re.Match[str]) -> str:
        kind, code = match.groups()
        if kind == "source":
            shown = inspect.getsource(rules()[code].check).rstrip()
        else:
            shown = "\n\n\n".join(example.source for example in examples(code))
        return f"```python\n{shown}\n```"

    if SHOWN in text:
        text = text.replace(SHOWN, f"```text\n{terminal.render(sample(), width=WIDTH).rstrip()}\n```")
    for file, page in MADE.items():
        text = re.sub(rf"\]\({file}\)", f"]({page})", text)
    return ASKED.sub(source, text)
