"""The Results pages, which are made of ``results/``."""

from __future__ import annotations

import dataclasses
import json
import re
from types import ModuleType
from typing import Any

from kbitcheck.compare import matrix, sweep
from kbitcheck.compare.sweep import Finding
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Party
from tests.scripts import DOCS, ROOT, benchmark


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


def test_an_architectures_gravest_failure_is_shown(site: dict[str, ModuleType]) -> None:
    """A MUST before others, the implementation's before others'; a table without places has none."""
    kept: dict[str, Any] = {
        "level": Level.SHOULD,
        "party": Party.MODEL,
        "where": "wte",
        "actual": "2 hooks",
        "failures": 1,
    }
    findings = [Finding(rule="KB505", **kept), Finding(rule="KB504", **{**kept, "party": Party.IMPLEMENTATION})]
    row = sweep.Row(architecture="llama", cls="", model="arch:llama", loads=True)

    def shown(*findings: Finding) -> str:
        return str(site["result_pages"]._first_failure(dataclasses.replace(row, findings=findings)))

    assert shown(*findings) == "KB504: wte: 2 hooks"
    assert shown(*findings, Finding(rule="KB303", **{**kept, "level": Level.MUST})) == "KB303: wte: 2 hooks"
    assert shown(Finding(rule="KB505", **{**kept, "where": ""})) == ""


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
