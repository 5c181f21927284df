"""The docs site's generated pages, and what keeps the site to itself. ``make docs`` builds it whole."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from kbitcheck.compare import matrix
from kbitcheck.core.report import Report
from kbitcheck.core.rule import rules
from kbitcheck.report import render, rule_page
from kbitcheck.report.parts import examples
from tests.scripts import benchmark

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


@pytest.fixture(scope="module")
def site() -> Iterator[dict[str, ModuleType]]:
    """The modules in ``docs/site``, imported as MkDocs does."""
    sys.path.insert(0, str(DOCS / "site"))
    yield {
        name: import_module(name)
        for name in (
            "notebook_page",
            "rule_pages",
            "other_pages",
            "picture",
            "result_pages",
            "symptom_pages",
            "upstream",
        )
    }
    sys.path.remove(str(DOCS / "site"))


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


def test_every_script_has_its_finding_and_every_record_its_script(
    site: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = site["other_pages"]
    page = others.findings()
    for script in (DOCS / "findings").glob("*.py"):
        assert page.count(f"{{ #{script.stem} }}") == 1
    for finding in others.committed_findings():
        for codes in others.excused_rules().get(finding.script, {}).values():
            assert all(code in finding.rules for code in codes)
    assert set(re.findall(r"KB\d{3}", page)) <= set(rules())
    assert "Not counted against the reference under [KB303](rules/KB303.md)." in page
    assert "Not counted against any implementation or model under [KB510](rules/KB510.md)." in page

    short = tmp_path / "findings.toml"
    text = others.FINDINGS.read_text(encoding="utf-8")
    short.write_text(text.replace('script = "peft_two_hooks"', 'script = "peft_three_hooks"'), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(others, "FINDINGS", short)
        with pytest.raises(ValueError, match="not every script"):
            others.findings()
    short.write_text('[[finding]]\nscript = "docs/findings/none.py"\nrule = "KB303"\n', encoding="utf-8")
    monkeypatch.setattr(others, "PACKAGE", tmp_path)
    with pytest.raises(ValueError, match="no script in docs/findings: none"):
        others.findings()


def test_every_finding_without_a_thread_has_a_report_to_file(site: dict[str, ModuleType]) -> None:
    upstream, findings = site["upstream"], site["other_pages"].committed_findings()
    committed = {path: path.read_text(encoding="utf-8") for path in (DOCS / "findings").glob("*.md")}
    assert committed == upstream.reports(), "run `python docs/site/upstream.py`"
    assert {path.stem for path in committed} == {f.script for f in findings if f.upstream == "none known"}
    fields = {path.stem: re.findall(r"^### (.+)$", text, re.MULTILINE) for path, text in committed.items()}
    assert fields["int_mm_one_column"] == ["🐛 Describe the bug", "Versions"]
    assert fields["bias_recast"] == ["System Info", "Reproduction", "Expected behavior"]
    for name, text in committed.items():
        assert (DOCS / "findings" / f"{name.stem}.py").read_text(encoding="utf-8").strip() in text


def test_the_saved_report_is_of_todays_rules_and_shown_where_it_is_asked_for(site: dict[str, ModuleType]) -> None:
    sample, shown = site["other_pages"].sample(), site["other_pages"].SHOWN
    assert {r.rule for r in sample} <= set(rules())
    assert sample.exit_code == 1
    assert "✗ KB201 norms-fp32" in site["other_pages"].filled(shown)
    assert len(render(sample, "html")) > 10_000
    assert [page.name for page in DOCS.glob("*.md") if shown in page.read_text(encoding="utf-8")] == ["report.md"]
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    (spec,) = sample.subject["cases"].values()
    for word in (spec["implementation"], spec["model"], spec["quant"], spec["checkpointing"]):
        assert word in re.findall(r"^\$ kbitcheck .*", text, re.MULTILINE)[0]


def test_the_picture_is_of_the_saved_report(
    site: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = site["picture"]
    assert picture.main(["--check"]) == 0, "run `python docs/site/picture.py`"
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "images" / "report.svg")
    assert picture.main([]) == 0
    text = picture.PICTURE.read_text(encoding="utf-8")
    assert "KB201" in text
    assert not re.search(r"@import|url\((?!#)|href=", text)
    picture.PICTURE.write_text(text.replace("KB201", "KB202"), encoding="utf-8")
    assert picture.main(["--check"]) == 1
    assert "has drifted" in capsys.readouterr().err


def test_pages_show_the_source_of_rules(site: dict[str, ModuleType]) -> None:
    page = site["other_pages"].filled((DOCS / "writing-a-rule.md").read_text(encoding="utf-8"))
    assert '@rule("KB409", "train-eval-untouched"' in page
    assert '@breaks("KB409")' in page
    assert "<!--" not in page
    with pytest.raises(KeyError):
        site["other_pages"].filled("<!-- source of rule KB999 -->")


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


def test_the_notebook_runs_and_its_page_shows_what_came_out(site: dict[str, ModuleType]) -> None:
    cells = [cell for cell in site["notebook_page"].cells() if cell.code]
    audited, findings, broken, data = cells[1].value, *cells[2:5]
    assert audited.exit_code == findings.value == 0
    assert findings.printed.count("\n") == len(audited.findings) > 0
    assert "✗ KB201 norms-fp32" in broken.page
    assert "Again: kbitcheck.check_implementation(prepare, " in broken.page
    assert data.printed.startswith("1 {'pass': ")
    assert ("KB201", "bfloat16") in data.value
    assert re.search(r'\n```\n\n<div><iframe title="✓ ready: [^>]* srcdoc="&lt;!doctype', cells[1].page)
    assert "```text\nLinear4bit(in_features=64, out_features=128, bias=False)\n```" in cells[0].page


def test_a_cell_that_raises_stops_the_build(
    site: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = {
        "cells": [{"cell_type": "markdown", "source": ["# A\n", "b"]}, {"cell_type": "code", "source": ["1 / 0"]}]
    }
    monkeypatch.setattr(site["notebook_page"], "NOTEBOOK", tmp_path / "a.ipynb")
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    cells = site["notebook_page"].cells()
    assert next(cells).page == "# A\nb"
    with pytest.raises(ZeroDivisionError):
        next(cells)
    assert "__notebook__" not in sys.modules


def test_the_notebook_is_kept_without_outputs() -> None:
    """They would be of another day; the site's build makes them anew."""
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    assert (notebook["nbformat"], len(code)) == (4, 6)


def targets(nav: Any) -> Iterator[str]:
    for entry in nav if isinstance(nav, list) else [nav]:
        if isinstance(entry, dict):
            yield from targets(next(iter(entry.values())))
        elif isinstance(entry, list):
            yield from targets(entry)
        else:
            yield entry


def test_every_page_is_in_the_menu_and_every_entry_is_a_page(result_pages: dict[str, str]) -> None:
    listed = set(targets(CONFIG["nav"]))
    pages = [*DOCS.glob("*.md"), *DOCS.glob("sweep/*.md")]
    written = {page.relative_to(DOCS).as_posix() for page in pages} | {"examples/fork/README.md"}
    made = {"rules/index.md", "findings.md", "kill-matrix.md", "notebook.md"}
    made |= {path for path in result_pages if re.fullmatch(r"results/[^/]+\.md", path)}
    assert listed - made == written - {"matrix.md"}  # which is the first page of results for those who read the code
    assert made <= listed


def test_the_site_is_strict_and_fetches_no_font() -> None:
    assert (CONFIG["strict"], CONFIG["theme"]["font"]) == ("true", "false")


@pytest.mark.parametrize(
    ("page", "refused"),
    [
        ('<script src="https://a.example/x.js"></script>', True),
        ("<script async src=//a.example/x.js></script>", True),
        ('<link rel="stylesheet" href="https://a.example/x.css">', True),
        ("<style>a { background: url(https://a.example/x.png) }</style>", True),
        ('<style>@import "//a.example/x.css";</style>', True),
        ('<img alt="x" src="http://a.example/x.png">', True),
        ('<a href="https://a.example/">x</a>', False),
        ('<link rel="canonical" href="https://a.example/">', False),
        ('<script src="assets/x.js"></script><img src="x.png">', False),
    ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(tmp_path: Path, page: str, refused: bool) -> None:
    mkdocs = pytest.importorskip("mkdocs.exceptions", reason="needs the extra `docs`")
    sys.path.insert(0, str(DOCS / "site"))
    try:
        hooks = import_module("hooks")
    finally:
        sys.path.remove(str(DOCS / "site"))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "page.html").write_text(page)

    class Config:
        site_dir = str(tmp_path)

    if refused:
        with pytest.raises(mkdocs.PluginError, match=r"below/page\.html loads from elsewhere"):
            hooks.on_post_build(Config)
    else:
        hooks.on_post_build(Config)


@pytest.fixture(scope="module")
def result_pages(site: dict[str, ModuleType]) -> dict[str, str]:
    return dict(site["result_pages"].pages())


def test_each_mark_that_is_bad_leads_to_what_broke_and_to_the_report(result_pages: dict[str, str]) -> None:
    rows = json.loads((ROOT / "results" / "matrix.json").read_text(encoding="utf-8"))["rows"]
    bad = {"broken MUST", "broken SHOULD", "error"}
    page = result_pages["results/releases.md"]
    marks = 0
    for row in rows:
        if not row["marks"]:
            assert row["subject"]["name"] in page.partition("## Not in the table")[2]
            continue
        (link,) = re.findall(rf'<a href="(releases/[^"#]+)\.html">{re.escape(row["subject"]["name"])}</a>', page)
        own = result_pages[f"results/{link}.md"]
        for code in (code for code, mark in row["marks"].items() if mark in bad):
            marks += 1
            assert f'href="{link}.html#{code.lower()}"' in page
            section = own.partition(f"### {code} {{ #{code.lower()} }}")[2].partition("###")[0]
            assert all(f"`{case}`" in section for case in row["broken"][code]), (link, code)
        report = link.replace("releases", "reports") + ".html"
        assert f"(../{report})" in own
        assert result_pages[f"results/{report}"].startswith("<!doctype html>")
        assert json.loads(result_pages[f"results/{link.replace('releases', 'badges')}.json"])["schemaVersion"] == 1
    assert marks > 50


def test_a_releases_page_says_what_changed(site: dict[str, ModuleType]) -> None:
    module = site["result_pages"]
    subject = matrix.Subject("PEFT 2", "peft==2")
    older = matrix.Row(
        matrix.Subject("PEFT 1", "peft==1"), {"KB101": matrix.Mark.KEPT, "KB102": matrix.Mark.MUST}, {}, {}
    )
    broken = {"KB101": {"tiny:llama-nf4-off": "wte: trains"}}
    newer = matrix.Row(subject, {"KB101": matrix.Mark.MUST, "KB102": matrix.Mark.KEPT}, broken, {"torch": "2.13.0"})
    report = Report(tool="t", environment={}, subject={}, results=(), blame="own")
    page = module._release(newer, report, [older])
    assert "kept before, MUST now (worse)" in page
    assert "MUST before, kept now (better)" in page
    assert "* `tiny:llama-nf4-off`: wte: trains" in page
    assert "Nothing." not in page
    assert "No mark." in module._release(newer, report, [newer])


def test_the_matrix_beside_the_code_is_that_of_the_results() -> None:
    page = (DOCS / "matrix.md").read_text(encoding="utf-8")
    assert page == benchmark("renew").page(ROOT / "results" / "matrix.json")


def test_architectures_have_a_row_for_each_task_and_quantization(result_pages: dict[str, str]) -> None:
    page = result_pages["results/architectures.md"]
    tables = sorted((ROOT / "results" / "sweep").glob("*.json"))
    rows = [json.loads(path.read_text(encoding="utf-8"))["rows"] for path in tables]
    assert page.count("<tr>") == 1 + sum(map(len, rows))
    assert tables


def test_trainers_and_steps_have_a_row_each(result_pages: dict[str, str]) -> None:
    rows = json.loads((ROOT / "results" / "trainers.json").read_text(encoding="utf-8"))
    own = (DOCS / "trainers.md").read_text(encoding="utf-8")
    page = result_pages["results/trainers.md"]
    assert page.count("<tr>") == 1 + len(rows)
    for name, anchor in ((row["trainer"], row["trainer"].lower().replace(" ", "-")) for row in rows.values()):
        assert f'<a href="../trainers.html#{anchor}">{name}</a>' in page
        assert f"### {name}\n" in own
    steps = [
        step
        for row in json.loads((ROOT / "results" / "gpu.json").read_text())["rows"]
        for step in row["measured"]["steps"]
    ]
    assert result_pages["results/memory-and-time.md"].partition("## Audits")[0].count("<tr>") == 1 + len(steps)
