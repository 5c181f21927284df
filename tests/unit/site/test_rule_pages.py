"""The pages of rules: every part of each, and the source of their faults."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from kbitcheck.core.rule import rules
from kbitcheck.report import rule_page
from kbitcheck.report.parts import examples
from tests.scripts import DOCS


@pytest.fixture(scope="module")
def rule_pages(site: dict[str, ModuleType]) -> dict[str, str]:
    return dict(site["rule_pages"].pages())


def test_every_rule_has_a_page_with_all_its_parts(rule_pages: dict[str, str]) -> None:
    assert set(rule_pages) == {"rules/index.md", *(f"rules/{code}.md" for code in rules())}
    for code, rule in rules().items():
        page = rule_pages[f"rules/{code}.md"]
        assert page.startswith(f"# {code} {rule.name}\n")
        assert f"[{code}]({code}.md)" in rule_pages["rules/index.md"]
        headings = re.findall(r"^## (.*)", page, re.MULTILINE)
        assert headings == ["Why", "You will see", "What to do", "What fails", "Sources", "Run it"], code
        assert re.search(rf'^@(breaks|wraps|spoils|trains|composes|saves|merges)\("{code}"', page, re.MULTILINE)
        assert page.count("```") % 2 == 0
        assert "``" not in re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def test_a_fault_is_shown_with_its_helpers() -> None:
    shown = {example.name: example for code in rules() for example in examples.examples(code)}
    scaled = shown["gradient_scaled_in_one_layer"]
    assert scaled.source.startswith("def scaled(")
    assert scaled.case == "tiny:llama, int8, reentrant"
    assert shown["a_copy_returned"].title.startswith("Done to the reference")
    assert shown["wraps_the_head"].source.startswith("class _CastOutputToFloat(")
    assert "besides freezing" in shown["wraps_the_head"].title
    assert shown["casts_norms_alone"].title.startswith("The cast of")


def test_a_rule_without_a_fault_stops_the_build(
    site: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "SABOTAGE", tmp_path)
    with pytest.raises(LookupError, match="KB101 has no fault"):
        dict(site["rule_pages"].pages())
    assert "What fails" not in rule_page.page(rules()["KB101"])


def test_sources_are_linked_and_nothing_else_is_markup(site: dict[str, ModuleType]) -> None:
    linked = site["rule_pages"].linked("peft#80, Soup#797, docs/findings/bias_recast.py.")
    assert linked == (
        "[peft#80](https://github.com/huggingface/peft/issues/80), Soup#797, [bias_recast](../findings.md#bias_recast)."
    )
    assert site["rule_pages"].prose("a ``b_c`` d_e <f> [g]") == r"a `b_c` d\_e \<f\> \[g\]"


def test_pages_show_the_source_of_rules(site: dict[str, ModuleType]) -> None:
    page = site["other_pages"].filled((DOCS / "writing-a-rule.md").read_text(encoding="utf-8"))
    assert '@rule("KB409", "train-eval-untouched"' in page
    assert '@breaks("KB409")' in page
    assert "<!--" not in page
    with pytest.raises(KeyError):
        site["other_pages"].filled("<!-- source of rule KB999 -->")
