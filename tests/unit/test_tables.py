"""The tables of a matrix and of a sweep, in each of their formats."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

from markdown_it import MarkdownIt

from kbitcheck.compare.matrix import Mark, Matrix, Row, Subject
from kbitcheck.compare.sweep import Finding, Table
from kbitcheck.compare.sweep import Row as Architecture
from kbitcheck.core.result import Level, Party
from kbitcheck.report.tables import matrix, sweep

STACK = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"}
GOOD = Row(
    Subject("good", "good.py:prepare"),
    {"KB101": Mark.KEPT, "KB102": Mark.SKIPPED, "KB103": Mark.KEPT, "KB201": Mark.KEPT, "KB301": Mark.KEPT},
    {},
    STACK,
)
BAD = Row(
    Subject("b|<d>", "bad.py:prepare"),
    {**GOOD.marks, "KB103": Mark.MUST, "KB201": Mark.SHOULD, "KB301": Mark.ERROR},
    {"KB301": {"tiny:llama-nf4-off": "RuntimeError: <no>", "tiny:llama-int8-off": "RuntimeError: <no>"}},
    STACK,
)
LEFT_OUT = Row(Subject("gone", ""), {}, {}, {}, error="left out: it is not a function")
MATRIX = Matrix(
    tool="kbitcheck 0", command="kbitcheck matrix x", cases=["tiny:llama-nf4-off"], rows=[GOOD, BAD, LEFT_OUT]
)


def cells(text: str) -> list[list[str]]:
    """The rows of a Markdown table as a reader of Markdown has them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    rows: list[list[str]] = []
    for token, content in pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append(content.content)
    return rows


def test_a_rule_with_the_same_mark_in_every_row_has_no_column() -> None:
    assert matrix.columns(MATRIX) == (
        ["KB103", "KB201", "KB301"],
        ["kept by every one: KB101", "not applicable to these cases: KB102"],
    )
    assert matrix.verdict(BAD) == "b|<d>: broken MUST: KB103, error: KB301, broken SHOULD: KB201, 1 kept"
    assert matrix.verdict(LEFT_OUT) == "gone: error: left out: it is not a function"
    assert matrix.verdict(replace(GOOD, complete=False)) == "good: 4 kept, interrupted"


def test_a_matrix_as_text() -> None:
    assert matrix.render(MATRIX, "text") == (
        "       transformers  KB103  KB201   KB301\n"
        "good   5.23.0        .      .       .\n"
        "b|<d>  5.23.0        MUST   should  error\n"
        "gone\n"
        "\n"
        "kept by every one: KB101\n"
        "not applicable to these cases: KB102\n"
        "b|<d>: KB301: RuntimeError: <no>\n"
        "gone: left out: it is not a function\n"
        "cases: tiny:llama-nf4-off\n"
    )


def test_a_matrix_as_markdown() -> None:
    text = matrix.render(MATRIX, "markdown")
    assert cells(text) == [
        ["implementation", "transformers", "KB103", "KB201", "KB301"],
        ["good", "5.23.0", "kept", "kept", "kept"],
        ["b|&lt;d&gt;", "5.23.0", "**MUST**", "**SHOULD**", "**error**"],
    ]
    assert "kbitcheck 0, python 3.11.7, torch 2.13.0; cases: tiny:llama-nf4-off." in text
    assert "* KB103: " in text
    assert "* `b|<d>`: KB301: RuntimeError: &lt;no&gt;" in text


def test_a_matrix_as_html_and_json() -> None:
    text = matrix.render(MATRIX, "html")
    assert '<tr><th scope="row">b|&lt;d&gt;</th><td>5.23.0</td><td class="MUST">MUST</td>' in text
    assert "<strong>gone</strong>: left out: it is not a function" in text
    assert json.loads(matrix.render(MATRIX, "json"))["rules"] == sorted(GOOD.marks)


SHARED = Finding(rule="KB505", level=Level.SHOULD, party=Party.IMPLEMENTATION, where="x", actual="two", failures=1)
STACKS = Finding(rule="KB405", level=Level.MUST, party=Party.STACK, where="x", actual="more", failures=1)
LLAMA = Architecture(
    architecture="Llama", cls="LlamaForCausalLM", model="llama", loads=True, prepares=True, trains=False,
    checkpointing="works", quantized=0.876, growth=1.234, inputs="text", adapters=8, dead_adapters=2,
    findings=(SHARED, STACKS),
)  # fmt: skip
GPT2 = replace(LLAMA, architecture="GPT2", adapters=8, dead_adapters=0, findings=(SHARED,))
NONE = Architecture(architecture="N|one", cls="", model="", loads=False, reason="OSError: <gone>")
SWEEP = Table(
    task="causal-lm", selected=3, options={"command": "kbitcheck sweep"}, environment=STACK, rows=[LLAMA, GPT2, NONE]
)


def test_a_finding_of_every_row_stands_once() -> None:
    assert sweep.common(SWEEP.rows) == (SHARED,)
    assert sweep.common([LLAMA, NONE]) == ()
    assert sweep.codes([SHARED, STACKS]) == "implementation: KB505; stack: KB405!"
    llama = ("Llama", "text", "yes", "yes", "no", "88%", "1.23", "works", "2 of 8", "stack: KB405!")
    assert sweep.cells(LLAMA, (SHARED,)) == llama
    assert sweep.cells(NONE) == ("N|one", "", "no", *[""] * 7)


def test_a_sweep_in_each_format() -> None:
    said = "2 of 3 causal-lm architectures audited, 0 with a broken MUST of the implementation, 1 not wholly judged"
    assert sweep.verdict(SWEEP) == said
    assert sweep.verdict(replace(SWEEP, complete=False)) == f"{said}; interrupted"
    text, markdown = (sweep.render(SWEEP, form) for form in ("text", "markdown"))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["architecture", "Llama", "GPT2", "N|one"]
    assert lines[-3:] == ["in every row: implementation: KB505", "", "N|one: OSError: <gone>"]
    assert [row[0] for row in cells(markdown)] == ["architecture", "Llama", "GPT2", "N|one"]
    assert {len(row) for row in cells(markdown)} == {len(sweep.COLUMNS)}
    assert f"{said}. python 3.11.7, torch 2.13.0, transformers 5.23.0." in markdown
    assert "In every row: implementation: KB505." in markdown
    assert "* `N|one`: OSError: &lt;gone&gt;" in markdown
    assert len(json.loads(sweep.render(SWEEP, "json"))["rows"]) == 3
