"""The page: what it holds, that it needs nothing else, and that a browser opens it."""

from __future__ import annotations

import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kbitcheck.compare import diff, gate
from kbitcheck.compare.accept import accept
from kbitcheck.compare.ledger import Ledger
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Status
from kbitcheck.core.rule import select
from kbitcheck.report import html
from kbitcheck.report.parts import charts
from tests import chromium
from tests.ledger.reports import INT8, NF4, OWN, SPECS, report, result
from tests.unit.test_formats import LARGE, MIXED, nasty

VOID = {"meta", "link", "br", "input", "img", "use", "path"}


class Page(HTMLParser):
    """Elements in order, and what is wrong with their nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if self.open[-1:] != [tag]:
            self.wrong.append(tag)
        else:
            self.open.pop()

    def names(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.mark.parametrize("found", [report(), MIXED, nasty(), LARGE], ids=range(4))
def test_the_page_is_well_formed_and_needs_no_other_file(found) -> None:
    text = html.render(found)
    page = Page(text)
    assert (page.wrong, page.open) == ([], [])
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,"))
            if (attrs.get(name) or "").startswith("#"):
                assert (attrs.get(name) or "")[1:] in ids
        for labelled in (attrs.get("aria-labelledby") or "").split():
            assert labelled in ids
    assert not re.search(r"@import|url\((?!#)", text)
    assert "http-equiv" not in text


def test_the_page_has_landmarks_headings_and_a_way_past_them() -> None:
    page = Page(html.render(MIXED))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.names(landmark)) == 1, landmark
    assert len(page.names("h1")) == 1
    links = [a for a in page.names("a") if a.get("class") == "skip"]
    assert [a["href"] for a in links] == ["#broken-rules"]
    assert page.names("html")[0]["lang"] == "en"
    assert len(page.names("details")) == len(page.names("summary"))


def test_the_page_tells_verdict_broken_rules_by_severity_and_the_command() -> None:
    text = html.render(MIXED)
    assert "✗ does not conform: 1 rule broken, 1 could not be judged" in text
    headings = re.findall("<h3>(.*)</h3>", text)
    assert headings[:3] == ["Decides the verdict", "Could not be judged", "Does not decide the verdict"]
    assert "attributed to fork:prepare · Contract</span>" in text
    assert ">Broken rules</h2>" in text
    assert "kbitcheck impl fork:prepare --model tiny:llama" in text
    assert "prefers-color-scheme: dark" in text


def test_the_head_names_model_and_size() -> None:
    facts = {"cases": {SPECS[0].id: {"model_class": "LlamaForCausalLM", "parameters": 8_030_000_000}}}
    one = report(facts=facts, subject={"cases": {SPECS[0].id: SPECS[0].as_json()}})
    head = html.render(one).partition("<h1")[0]
    assert "tiny:llama (LlamaForCausalLM, 8.03 B) · " in head


def test_a_folded_rule_says_what_it_requires() -> None:
    page = html.render(report(result("KB505", NF4, Status.FAIL, level=Level.SHOULD)))
    (summary,) = re.findall(r"<details>\n<summary>(.*)</summary>\n<div", page)
    assert "one input-grad hook, and none after <code>disable_input_require_grads()</code>" in summary


def test_nothing_in_a_report_becomes_markup() -> None:
    text = html.render(nasty())
    assert "<script>&amp;" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<script>") == 1


def test_the_page_tells_of_the_gate_and_hides_what_is_accepted() -> None:
    failing = report(result("KB505", NF4, Status.FAIL), result("KB201", NF4, Status.FAIL))
    ledger = Ledger.parse(accept(report(result("KB505", NF4, Status.FAIL))).replace('reason = ""', 'reason = "so"'))
    text = html.render(gate.judge(failing, ledger))
    assert 'id="changes"' in text
    cells = '<td class="bad" data-key="1" data-label="direction">worse</td><td data-label="change">regressed</td>'
    assert f'<tr><th scope="row">KB201 norms-fp32</th>{cells}' in text
    assert text.index('<h2 id="changes"') < text.index('<h2 id="broken-rules"')
    assert "KB505 one-hook-and-removable</strong>" not in text


def test_a_comparison_shows_what_got_worse_first_and_what_got_better_last() -> None:
    before = report(result("KB101", NF4, Status.FAIL), result("KB505", INT8, Status.FAIL))
    after = report(result("KB505", NF4, Status.FAIL), result("KB201", NF4, Status.SKIP))
    page = html.render(gate.settle(after, "a.json", diff.compare(before, after, names=("a.json", "b.json"))))
    rows = re.findall(
        r'<tr><th scope="row">(KB\d+) .*?</th><td class="\w+" data-key="\d" data-label="direction">(\w+)</td><td data-label="change">(\w+)',
        page,
    )
    assert rows == [
        ("KB505", "worse", "regressed"), ("KB201", "worse", "lost"), ("KB101", "better", "fixed"), ("KB505", "better", "fixed"),
    ]  # fmt: skip
    values = re.findall(r'<h2>(\w+)</h2><p class="number">(.*?)</p><p>(.*?)</p>', page)
    assert values == [
        ("Worse", "✗ 2 changes", "1 regressed, 1 lost"),
        ("Better", "✓ 2 changes", "2 fixed"),
        ("Other", "0 changes", "none"),
    ]
    same = html.render(gate.settle(after, "a.json", diff.compare(after, after)))
    assert "<p>Nothing changed.</p>" in same


def test_charts_follow_the_page_and_have_their_numbers_beside_them() -> None:
    text = html.render(LARGE)
    page = Page(text)
    assert len(page.names("figure")) == len(page.names("svg")) == 3
    assert "currentColor" in text
    assert "var(--series-0)" in text
    assert not re.search("#0102[0-9a-f]{2}", text)
    assert "The numbers: Gradient error by block" in text


def drawn(groups: dict[str, dict[str, int]]) -> Report:
    return report(facts={"cases": {SPECS[0].id: {"bytes_by_group": groups}}})


def test_no_group_of_bytes_is_lost_from_the_chart() -> None:
    """There are more groups than colours: the smallest share the last one."""
    sizes = {f"g{n}": 10**n for n in range(10)} | {"quantized": 7}
    (chart,) = charts.charts(drawn({"loaded": sizes, "prepared": sizes}))
    assert [c for c in chart.columns[1:-1] if c != "quantized"] == [f"g{n}" for n in range(10)]
    assert chart.rows[0][-1] == f"{sum(sizes.values()):,}"
    assert [chart.svg.count(f">{label}<") for label in ("g9", "g4", "g3", "the rest")] == [1, 1, 0, 1]
    few = {"quantized": 7, "new": 5}
    (chart,) = charts.charts(drawn({"loaded": few, "prepared": few}))
    assert (">new<" in chart.svg, "the rest" in chart.svg) == (True, False)


def test_activations_are_those_of_a_case_that_checkpoints() -> None:
    def facts(held: int) -> dict[str, Any]:
        blocks = {"blocks": ["h.0"], "plain": [100], "checkpointed": [held]}
        return {"activations_by_block": blocks, "activations": 100, "checkpointed": held}

    specs = {mode: dataclasses.replace(SPECS[0], checkpointing=mode) for mode in ("off", "reentrant")}
    cases = {"off": facts(100), "reentrant": facts(10)}
    subject = {"cases": {mode: spec.as_json() for mode, spec in specs.items()}}
    (chart,) = charts.charts(report(subject=subject, facts={"cases": cases}))
    assert chart.caption.startswith("reentrant: ")
    (alone,) = charts.charts(report(subject=subject, facts={"cases": {"off": facts(100)}}))
    assert alone.caption.startswith("off: ")


def test_a_rule_that_fails_in_several_ways_is_told_once() -> None:
    other = dataclasses.replace(OWN, actual="bfloat16")
    page = html.render(report(result("KB505", NF4, Status.FAIL), result("KB505", INT8, Status.FAIL, other)))
    assert page.count("KB505 one-hook-and-removable</strong>") == 1
    assert page.count('<span class="soft">found</span> bfloat16') == page.count("found</span> float16") == 1
    assert "<code>disable_input_require_grads()</code>" in page
    assert "MUST · 2 cases · attributed to fork:prepare · Contract</span>" in page


def test_without_matplotlib_the_numbers_remain(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = html.render(LARGE)
    assert "<svg" not in text
    assert "kbitcheck[html]" in text
    assert "The numbers: Gradient error by block" in text


def test_the_page_explains_its_words() -> None:
    text = html.render(MIXED)
    assert '<a href="#glossary">' in text
    for word in ("Case", "Witness", "Twin", "Live adapter", "Profile"):
        assert text.count(f"<strong>{word}</strong>") == 1
    assert "<code>tiny:llama-nf4-reentrant</code>" in text[text.index('id="glossary"') :]
    assert "](" not in text


@chromium.NEEDED
def test_a_browser_opens_the_page_without_a_complaint(tmp_path: Path) -> None:
    ran = chromium.dumped(html.render(LARGE), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "CONSOLE" not in ran.stderr, ran.stderr
    assert ran.stdout.count("<svg") == 3
    # The script ran: it shows the buttons where there is a clipboard.
    assert re.search(r'<button type="button" class="copy"( hidden="")?>', ran.stdout)


@chromium.NEEDED
def test_nothing_runs_out_of_a_page_as_wide_as_a_telephone(tmp_path: Path) -> None:
    """Neither names of any length nor charts; tables scroll by themselves."""
    name = "base_model.model.model.language_model." * 9 + "weight"
    long = dataclasses.replace(OWN, where=name, expected=name, actual=name)
    cases = {SPECS[0].id: LARGE.facts["cases"]["tiny:m0-nf4-off"]}
    page = html.render(report(result("KB201", NF4, Status.FAIL, long), facts={"cases": cases}, environment={"x": name}))
    script = """
      for (const details of document.querySelectorAll("details")) details.open = true;
      const width = document.documentElement.clientWidth;
      const out = [...document.querySelectorAll("svg, p, pre, summary, code")].filter(
        (e) => !e.closest(".scroll") && e.getBoundingClientRect().right > width);
      return [innerWidth, document.documentElement.scrollWidth - width, out.length];"""
    assert chromium.framed([page], tmp_path, script, widths=(390,)) == [[390, 0, 0]]


@chromium.NEEDED
def test_a_wide_screen_shows_the_whole_grid(tmp_path: Path) -> None:
    page = html.render(report(*(result(rule.code, NF4) for rule in select())))
    script = """
      const [grid, prose] = [...document.querySelectorAll(".wide .scroll, section:first-child")].reverse();
      return [grid.scrollWidth - grid.clientWidth, grid.clientWidth > prose.clientWidth];"""
    assert chromium.framed([page], tmp_path, script, widths=(2400,)) == [[0, True]]
