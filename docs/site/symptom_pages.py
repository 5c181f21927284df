"""Pages of messages, and the table of them in ``docs/symptoms.md``, from ``docs/symptoms.toml``; run it to write the table anew."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import rule_pages

from kbitcheck.core.rule import rules
from kbitcheck.report.parts.markup import code, table
from kbitcheck.report.rule_page import first_sentence, rule_page

DOCS = Path(__file__).parents[1]
SOURCE, PAGE = DOCS / "symptoms.toml", DOCS / "symptoms.md"
BEGIN, END = "<!-- messages: written by docs/site/symptom_pages.py -->\n", "<!-- end of messages -->"
REMEDY = "What to do"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Exact texts of one symptom; ``when`` says where the text alone does not tell it from another's."""

    slug: str
    texts: Sequence[str]
    cause: str
    run: str
    rules: Sequence[str]
    when: str = ""

    @property
    def page(self) -> str:
        """The page: texts, cause, command, rules, and what to do."""
        first, *others = self.texts
        out = [f"# {code(first)}{' ' + self.when if self.when else ''}\n"]
        out += [f"Also: {', '.join(map(code, others))}.\n"] if others else []
        out += [f"**Often the cause.** {rule_pages.prose(self.cause)}.\n", "**The command that tells:**\n"]
        block = "console\n$ " if self.run.startswith("kbitcheck ") else "python\n"
        out += [f"```{block}{self.run}\n```\n", "## The rule\n"]
        for name in self.rules:
            requirement = rule_pages.prose(first_sentence(rules()[name].requirement)).rstrip(".")
            out.append(f"[{rules().title(name)}](../rules/{name}.md): {requirement}.\n")
        remedies = dict(rule_page(rules()[self.rules[0]]).explanations)
        out += [f"## {REMEDY}\n", f"{rule_pages.prose(remedies[REMEDY])}\n"]
        out.append("[All symptoms and messages](../symptoms.md)\n")
        return "\n".join(out)

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The cells of the table."""
        texts = ", ".join(map(code, self.texts)) + (f" {self.when}" if self.when else "")
        return texts, rule_pages.prose(self.cause), f"`{self.run}`", ", ".join(self.rules)


def messages() -> list[Message]:
    """The messages, in the file's order."""
    return [Message(**entry) for entry in tomllib.loads(SOURCE.read_text(encoding="utf-8"))["message"]]


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of each message's page."""
    for message in messages():
        yield f"symptoms/{message.slug}.md", message.page


def written() -> str:
    """The page of symptoms with the table of messages."""
    lines = table(("message", "often the cause", "run", "rule"), [message.row for message in messages()])
    text = PAGE.read_text(encoding="utf-8")
    between = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return between.sub(lambda _: "\n".join([BEGIN, *lines, "", END]), text)


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
