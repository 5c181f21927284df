"""The page of a rule, for ``kbitcheck rules CODE`` and for the documentation, and the index of all rules."""

import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import getdoc

from kbitcheck.core.rule import Rule
from kbitcheck.report.parts.examples import Example, examples

FAMILIES = {
    "freezing": "Freezing",
    "precision": "Precision and storage",
    "recipe": "Recipe of dtypes",
    "watched": "Your own training",
    "loop": "Your own training",
    "batches": "Your own training",
    "optimizer": "Your own training",
    "gradients": "Gradient flow",
    "drawn": "Gradient flow",
    "checkpointing": "Gradient checkpointing",
    "contract": "Contract",
    "use": "Later use",
    "cost": "Cost of preparing",
    "composition": "Composition",
    "audit": "Facts about the model",
    "start": "Adapters of a configuration",
    "adapter": "Saved adapters",
    "quantizer": "What is quantized",
}
# Sections of a rule's docstring, and their headings.
HEADINGS = {"Why": "Why", "Symptom": "You will see", "Fix": "What to do"}
COMMANDS_ABOUT: Mapping[str, Callable[[str], tuple[str, ...]]] = {
    "model": lambda code: (
        f"kbitcheck impl mypkg:prepare --select {code}",
        f"pytest --kbit-impl mypkg:prepare --kbit-select {code}",
    ),
    "composition": lambda code: (f"kbitcheck impl mypkg:prepare --suite composition --select {code}",),
    "adapter": lambda code: (f"kbitcheck adapter DIR --select {code}",),
}
FAILS, SOURCES, COMMANDS = "What fails", "Sources", "Run it"


@dataclass(frozen=True, slots=True)
class RulePage:
    """What there is to read about a rule; texts are prose with code between backticks.

    ``explanations`` are a heading and a text each, ``examples`` the faults that the rule catches.
    """

    title: str
    level: str
    family: str
    requirement: str
    details: tuple[str, ...]
    explanations: tuple[tuple[str, str], ...]
    catches: str
    examples: tuple[Example, ...]
    sources: str
    commands: tuple[str, ...]


def rule_page(rule: Rule) -> RulePage:
    """The page of a rule."""
    body = re.split(r"^(?:Why|Symptom|Fix|Sources):", getdoc(rule.check) or "", maxsplit=1, flags=re.MULTILINE)[0]
    requirement, *details = [" ".join(part.split()).replace("``", "`") for part in body.strip().split("\n\n")]
    sections = ((heading, rule.section(name)) for name, heading in HEADINGS.items())
    return RulePage(
        title=f"{rule.code} {rule.name}",
        level=rule.level.value,
        family=FAMILIES.get(rule.family, rule.family),
        requirement=requirement,
        details=tuple(details),
        explanations=tuple((heading, _sentence(text)) for heading, text in sections if text),
        catches=f"`kbitcheck selftest --select {rule.code}` shows that the rule catches:",
        examples=examples(rule.code),
        sources=_sentence(rule.section("Sources")),
        commands=COMMANDS_ABOUT[rule.about](rule.code),
    )


def page(rule: Rule) -> str:
    """The page of a rule, for a terminal."""
    shown = rule_page(rule)
    width = min(shutil.get_terminal_size((110, 0)).columns, 110)
    blocks = [
        f"{shown.title} ({shown.level}, {shown.family})",
        *(_wrapped(text, width) for text in (shown.requirement, *shown.details)),
        *(f"{heading}\n{_wrapped(text, width, '  ')}" for heading, text in shown.explanations),
        *([f"{FAILS}\n{_wrapped(shown.catches, width, '  ')}"] if shown.examples else []),
        *(f"  {e.title} ({e.case}):\n\n{textwrap.indent(e.source, '      ')}" for e in shown.examples),
        *([f"{SOURCES}\n{_wrapped(shown.sources, width, '  ')}"] if shown.sources else []),
        f"{COMMANDS}\n" + "\n".join(f"  $ {command}" for command in shown.commands),
    ]
    return "\n\n".join(blocks) + "\n"


def index(rules: Sequence[Rule]) -> str:
    """One line a rule, by family."""
    width = max((len(rule.name) for rule in rules), default=0)
    blocks = []
    families: dict[str, list[Rule]] = {}
    for rule in rules:
        families.setdefault(FAMILIES.get(rule.family, rule.family), []).append(rule)
    for family, members in families.items():
        rows = [f"  {r.code}  {r.level.value:6}  {r.name:{width}}  {first_sentence(r.requirement)}\n" for r in members]
        blocks.append("".join([f"{family}\n", *rows]))
    return "\n".join(blocks)


def first_sentence(text: str) -> str:
    """The text up to its first full stop."""
    return text.split(". ")[0].removesuffix(".")


def _sentence(text: str) -> str:
    """The text with a capital where it begins with a word, and with a full stop."""
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+[ ,;]", text) else text
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
