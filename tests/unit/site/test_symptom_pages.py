"""A page for each message that people search for."""

from __future__ import annotations

import re
from types import ModuleType

from kbitcheck.core.rule import rules
from tests.scripts import DOCS


def test_every_message_has_a_page_with_cause_rule_and_command(site: dict[str, ModuleType]) -> None:
    pages, messages = dict(site["symptom_pages"].pages()), site["symptom_pages"].messages()
    assert len(pages) == len(messages) >= 30
    texts = [(text, message.when) for message in messages for text in message.texts]
    assert len(texts) == len(set(texts))
    for message in messages:
        page = pages[f"symptoms/{message.slug}.md"]
        assert all(text in page for text in message.texts)
        assert message.run in page
        assert all(f"[{rules().title(code)}](../rules/{code}.md): " in page for code in message.rules)
        assert re.search(r"^## What to do\n\n\S", page, re.MULTILINE)


def test_the_table_of_messages_is_what_the_data_says(site: dict[str, ModuleType]) -> None:
    assert (DOCS / "symptoms.md").read_text(encoding="utf-8") == site["symptom_pages"].written()
