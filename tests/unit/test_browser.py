"""Every HTML page in a browser: axe-core finds nothing, nothing runs out of a narrow screen, tables sort and filter, paper has it all."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kbitcheck.compare import diff, gate
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Level, Status
from kbitcheck.core.rule import select
from kbitcheck.report import html
from kbitcheck.report.tables import matrix, sweep
from tests import chromium
from tests.ledger.reports import report, result
from tests.unit.test_charts import FORECAST as STEP
from tests.unit.test_first_screen import FORECAST, TRAINED
from tests.unit.test_tables import of_architectures, of_releases

AXE = (Path(__file__).parents[1] / "data" / "axe" / "axe-4.14.1.min.js").read_text(encoding="utf-8")
VIOLATIONS = """
  for (const details of document.querySelectorAll("details")) details.open = true;
  const found = await axe.run(document, {resultTypes: ["violations"]});
  const of = (v) => v.id + ": " + v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200)).join(" | ");
  return [matchMedia("(prefers-color-scheme: dark)").matches, innerWidth].concat(found.violations.map(of));"""
pytestmark = [chromium.NEEDED, pytest.mark.xdist_group("browser")]


def audit() -> Any:
    """A full audit with every kind of result, a forecast with its map, and every chart."""
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="peft", checkpointing="off", memory=24 << 30)
    kinds = (
        (Status.PASS, Level.MUST),
        (Status.FAIL, Level.MUST),
        (Status.SKIP, Level.MUST),
        (Status.FAIL, Level.SHOULD),
    )
    results = [
        result(rule.code, spec.id, *kinds[n % 4][:1], level=kinds[n % 4][1]) for n, rule in enumerate(select())
    ] + [result("KB304", spec.id, Status.ERROR)]
    facts = {
        **TRAINED, "forecast": {**FORECAST, **{name: STEP[name] for name in ("parts", "curve", "accumulate")}},
        "bytes_by_group": {"loaded": {"quantized": 9, "norms": 2}, "prepared": {"quantized": 9, "norms": 4}},
        "activations_by_block": {"blocks": ["h.0", "h.1"], "plain": [40, 60], "checkpointed": [10, 10]},
    }  # fmt: skip
    subject = {
        "command": "model",
        "cases": {spec.id: spec.as_json()},
        "in_process": False,
        "implementation": {"name": "peft"},
    }
    whole = report(subject=subject, facts={"cases": {spec.id: facts}, "seconds": 9.0}, blame="any")
    return dataclasses.replace(whole, results=tuple(results))


@cache
def pages() -> dict[str, str]:
    """The four kinds of pages by name, those of tables as large as they get."""
    now = audit()
    before = dataclasses.replace(
        now, results=[dataclasses.replace(r, status=Status.PASS, failures=()) for r in now.results[::2]]
    )
    changes = diff.compare(before, now, names=("a.json", "b.json"))
    return {
        "report": html.render(now),
        "diff": html.render(gate.settle(now, "a.json", changes)),
        "matrix": matrix.render(of_releases(30), "html"),
        "sweep": sweep.render(of_architectures(189), "html"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "diff", "matrix", "sweep"])
def test_axe_finds_nothing(name: str, tmp_path: Path) -> None:
    page = pages()[name]
    if name == "matrix":  # as large a one takes axe a minute
        page = matrix.render(of_releases(4), "html")
    seen = chromium.framed([page], tmp_path, VIOLATIONS, library=AXE, widths=(390, 1600), schemes=("light", "dark"))
    assert seen == [[dark, width] for width in (390, 1600) for dark in (False, True)]


@pytest.mark.slow
def test_axe_finds_what_is_wrong(tmp_path: Path) -> None:
    """The test above can fail: of a picture without words, and of words that are hardly there."""
    page = pages()["sweep"].replace(
        "<main>", '<main><img src="data:,"><p style="color: #ccc; background: #fff">faint</p>'
    )
    ((_, _, *found),) = chromium.framed([page], tmp_path, VIOLATIONS, library=AXE)
    assert {violation.partition(":")[0] for violation in found} == {"color-contrast", "image-alt"}


def test_nothing_runs_out_of_a_narrow_screen(tmp_path: Path) -> None:
    script = """
      for (const details of document.querySelectorAll("details")) details.open = true;
      return document.documentElement.scrollWidth - document.documentElement.clientWidth;"""
    found = pages()
    assert set(found) == {"report", "diff", "matrix", "sweep"}
    assert chromium.framed([*found.values()], tmp_path, script, widths=(390, 1600)) == [0] * 8


def test_sentences_in_tables_are_read_whole_on_a_telephone(tmp_path: Path) -> None:
    """What changed and what broke: a row is a card there, whose lines name their columns, and a row that is filtered out is gone."""
    script = """
      return [...document.querySelectorAll(".of-cards")].map((box) => {
        const rows = [...box.querySelectorAll("tbody tr")], cell = rows[0].cells[1];
        rows[1].hidden = true;
        return [box.scrollWidth - box.clientWidth, getComputedStyle(cell, "::before").content !== "none", rows[1].offsetHeight];
      });"""
    shown = pages()
    narrow, wide = [[0, True, 0]], [[0, False, 0]]
    assert chromium.framed([shown["diff"]], tmp_path, script, widths=(390, 1600)) == [narrow, wide]
    assert chromium.framed([shown["matrix"]], tmp_path, script) == [narrow * 3]


def test_the_first_screen_of_a_telephone_has_the_three_numbers(tmp_path: Path) -> None:
    script = (
        """return [...document.querySelectorAll(".deciding li")].map((e) => e.getBoundingClientRect().bottom <= 844);"""
    )
    assert chromium.framed([pages()["report"]], tmp_path, script, widths=(390, 1600)) == [[True] * 3] * 2


def test_columns_sort_by_keyboard_and_say_so(tmp_path: Path) -> None:
    script = """
      const table = document.querySelector("#table-rows"), heads = [...table.tHead.rows[0].cells];
      const first = (column) => [...table.tBodies[0].rows].slice(0, 3).map((row) => row.cells[column].textContent.trim());
      const states = () => heads.map((head) => head.getAttribute("aria-sort")).filter((state) => state !== "none");
      const press = (column) => { const button = heads[column].querySelector("button"); button.focus();
        if (document.activeElement !== button) throw "no focus"; button.click(); };
      const seen = [states()];
      for (const column of [0, 0, 5]) { press(column); seen.push([first(column), states()]); }
      return seen;"""
    (seen,) = chromium.framed([pages()["sweep"]], tmp_path, script)
    assert seen == [
        [],
        [["arch0", "arch1", "arch2"], ["ascending"]],
        [["arch188", "arch187", "arch186"], ["descending"]],
        [["0%", "1%", "1%"], ["ascending"]],
    ]


def test_the_worst_sorts_first_and_nothing_last(tmp_path: Path) -> None:
    script = """
      const table = document.querySelector("#table-rows"), rows = () => [...table.tBodies[0].rows];
      const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === "KB103");
      const marks = () => [...new Set(rows().map((row) => row.cells[head.cellIndex].textContent.trim()))];
      head.querySelector("button").click();
      const first = marks();
      head.querySelector("button").click();
      return [first, marks()];"""
    made = of_releases(14)
    marks, broken = {**made.rows[3].marks}, {**made.rows[3].broken}
    del marks["KB103"]
    broken.pop("KB103", None)
    blank = dataclasses.replace(made.rows[3], marks=marks, broken=broken)
    made = dataclasses.replace(made, rows=[*made.rows[:3], blank, *made.rows[4:]])
    (seen,) = chromium.framed([matrix.render(made, "html")], tmp_path, script)
    order = ["MUST", "error", "SHOULD", "kept", "n/a"]
    assert seen == [[*order, ""], [*order[::-1], ""]]


def test_words_and_choices_leave_rows_out(tmp_path: Path) -> None:
    script = """
      const table = document.querySelector("#table-rows"), form = document.querySelector("form[data-for=table-rows]");
      const words = form.querySelector("input"), loads = form.querySelector("select");
      const shown = () => [[...table.tBodies[0].rows].filter((row) => row.offsetParent).length, form.querySelector("output").textContent];
      const seen = [shown()];
      const set = (field, value) => { field.value = value; field.dispatchEvent(new Event("input", {bubbles: true})); seen.push(shown()); };
      set(words, "ARCH1 text"); set(words, ""); set(loads, "no"); set(words, "arch7"); set(words, "nowhere");
      return [form.hidden, loads.labels[0].textContent.trim().split(" ")[0], seen];"""
    (seen,) = chromium.framed([pages()["sweep"]], tmp_path, script)
    numbers = [189, 100, 189, 10, 1, 0]
    assert seen == [False, "loads", [[number, f"{number} of 189"] for number in numbers]]


def test_paper_has_whole_tables_and_no_controls(tmp_path: Path) -> None:
    script = """
      const sheet = document.styleSheets[0];
      for (const rule of [...sheet.cssRules]) if (rule.media && rule.media.mediaText === "print")
        for (const inner of [...rule.cssRules]) sheet.insertRule(inner.cssText, sheet.cssRules.length);
      const of = (selector, name) => [...new Set([...document.querySelectorAll(selector)].map((e) => getComputedStyle(e)[name]))];
      return [of(".choose, nav, .copy", "display"), of(".scroll", "maxHeight"), document.querySelectorAll("td").length > 99];"""
    assert chromium.framed([pages()["report"], pages()["sweep"]], tmp_path, script) == [[["none"], ["none"], True]] * 2
