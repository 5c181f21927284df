"""The tables of a matrix and of a sweep, in each of their formats."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

from markdown_it import MarkdownIt

from kbitcheck.compare import releases
from kbitcheck.compare.matrix import Mark, Matrix, Row, Subject
from kbitcheck.compare.sweep import Finding, Table
from kbitcheck.compare.sweep import Row as Architecture
from kbitcheck.core.result import Level, Party
from kbitcheck.core.rule import select
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


def of_releases(count: int) -> Matrix:
    """Releases of one library in which marks come and go, with long evidence in four cases."""
    codes = [rule.code for rule in select()]
    cases = [f"tiny:llama-{quant}-{mode}" for quant in ("nf4", "int8") for mode in ("default", "reentrant")]
    marks = (Mark.KEPT, Mark.KEPT, Mark.SKIPPED, Mark.SHOULD, Mark.KEPT, Mark.MUST, Mark.ERROR, *[Mark.KEPT] * 4)
    rows = []
    for n in range(count):
        of_row = {code: marks[(i + n // (1 + i % 5)) % len(marks)] for i, code in enumerate(codes)}
        evidence = dict.fromkeys(
            cases, f"model.layers.{n}.self_attn.q_proj.weight: expected float32; found float16 " * 3
        )
        broken = {code: evidence for code, mark in of_row.items() if mark in matrix.BAD}
        rows.append(Row(Subject(f"PEFT 0.{n}.0", f"peft==0.{n}.0"), of_row, broken, STACK))
    return Matrix(tool="kbitcheck 0", command="kbitcheck matrix x", cases=cases, rows=rows[::-1])


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
    assert '<tr><th scope="row">b|&lt;d&gt;</th><td>5.23.0</td><td class="must" data-key="1">MUST</td>' in text
    assert "<strong>gone</strong>: left out: it is not a function" in text
    assert 'id="worse"' not in text  # no two rows are releases of one library
    assert json.loads(matrix.render(MATRIX, "json"))["rules"] == sorted(GOOD.marks)


def test_what_got_worse_stands_first() -> None:
    """From release to release, in the order of versions, whatever the order of the rows."""

    def release(version: str, **marks: Mark) -> Row:
        broken = {code: {"case": "why"} for code, mark in marks.items() if mark in matrix.BAD}
        return Row(Subject(f"P {version}", f"peft=={version}"), marks, broken, STACK)

    rows = [
        release("0.9.0", KB101=Mark.KEPT, KB102=Mark.SHOULD, KB103=Mark.ERROR),
        release("0.10.0", KB101=Mark.MUST, KB102=Mark.MUST, KB103=Mark.SKIPPED, KB201=Mark.MUST),
        release("0.10.0rc1", KB101=Mark.SHOULD, KB102=Mark.KEPT, KB103=Mark.SKIPPED),
        Row(Subject("other", "trl==0.10.0"), {"KB101": Mark.MUST}, {}, STACK),
        Row(Subject("own", "own.py:prepare"), {"KB101": Mark.MUST}, {}, STACK),
    ]
    changed = [(step.after, step.rule, step.was, step.now, step.worse, step.better) for step in releases.steps(rows)]
    assert changed == [
        ("P 0.10.0", "KB101", Mark.SHOULD, Mark.MUST, True, False),
        ("P 0.10.0", "KB102", Mark.KEPT, Mark.MUST, True, False),
        ("P 0.10.0rc1", "KB101", Mark.KEPT, Mark.SHOULD, True, False),
        ("P 0.10.0rc1", "KB102", Mark.SHOULD, Mark.KEPT, False, True),
        ("P 0.10.0rc1", "KB103", Mark.ERROR, Mark.SKIPPED, False, False),
    ]
    text = matrix.render(replace(MATRIX, rows=rows), "html")
    assert re.findall('<h2 id="([a-z]+)"', text)[:2] == ["worse", "rows"]
    assert text.index(">MUST</td><td") < text.index(">SHOULD</td><td")
    same = matrix.render(replace(MATRIX, rows=[rows[0], release("0.9.1", **rows[0].marks)]), "html")
    assert same.count("Nothing, from any release to the next.") == 2


def test_releases_are_in_the_order_that_installers_have() -> None:
    ordered = [
        "0.9.dev1",
        "0.9a2",
        "0.9rc1",
        "0.9",
        "0.9+cu128",
        "0.9.post1",
        "0.9.post10",
        "0.9.1.dev0",
        "0.9.1",
        "0.10.0",
        "1!0.1",
    ]
    rows = [Row(Subject(v, f"peft=={v}::a:b"), {"KB101": Mark.KEPT}, {}, STACK) for v in sorted(ordered)]
    rows.append(replace(rows[0], subject=Subject("branch", "peft @ git+https://example.org/peft::a:b")))
    pairs = [(older.subject.name, newer.subject.name) for older, newer in releases.releases(rows)]
    assert pairs == list(pairwise(ordered))[::-1]


def test_large_tables_are_small_files() -> None:
    for text in (matrix.render(of_releases(30), "html"), sweep.render(of_architectures(189), "html")):
        assert 50_000 < len(text.encode()) < 1_000_000


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


def of_architectures(count: int) -> Table:
    """A sweep of so many; every tenth breaks a MUST, every twentieth does not load."""
    rows = [
        replace(
            LLAMA if n % 10 else replace(LLAMA, findings=(SHARED, replace(STACKS, party=Party.IMPLEMENTATION))),
            architecture=f"arch{n}", loads=bool(n % 20 - 7), trains=bool(n % 3), quantized=n / count, growth=1 + n / 7,
            reason="" if n % 20 - 7 else "OSError: a long reason " * 9,
        )
        for n in range(count)
    ]  # fmt: skip
    return replace(SWEEP, selected=count, rows=rows)


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


def test_a_sweep_as_html_begins_with_what_counts() -> None:
    own = replace(LLAMA, architecture="Own", findings=(replace(STACKS, party=Party.IMPLEMENTATION),))
    text = sweep.render(replace(SWEEP, rows=[GPT2, NONE, own, LLAMA]), "html")
    assert re.findall('<tr><th scope="row">(.*?)</th>', text) == ["Own", "N|one", "GPT2", "Llama"]
    assert '<td class="must">implementation: KB405!</td>' in text
    assert '<td class="bad">no</td>' in text
    assert "OSError: &lt;gone&gt;" in text
    assert '<h1 class="bad">✗ Sweep of causal-lm architectures<span class="counts">3 of 3 causal-lm' in text
