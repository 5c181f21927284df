"""The Results pages, from the JSON under ``results/``, which ``make results`` renews."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import measured_pages
import rule_pages
from result_tables import RESULTS, read, sortable

from kbitcheck.compare.matrix import Mark, Matrix, Row
from kbitcheck.compare.releases import Step, releases, steps
from kbitcheck.compare.sweep import Row as Architecture
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Party, Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.report import badge, render
from kbitcheck.report.parts.limits import SHORT
from kbitcheck.report.parts.markup import code, table
from kbitcheck.report.parts.sortable import Cell, Sortable
from kbitcheck.report.report_folder import file_name
from kbitcheck.report.tables.matrix import HTML_WORDS, columns, mark_cell
from kbitcheck.report.tables.sweep import COLUMNS, html_row
from kbitcheck.report.templates import template

SCRIPT = "site/tables.js"
BAD = (Mark.MUST, Mark.ERROR, Mark.SHOULD)
UP, UP_TWICE = "](../", "](../../"  # from the folder of rules, and from that of releases
NAMED = {Mark.MUST: "MUST", Mark.ERROR: "Not judged", Mark.SHOULD: "SHOULD"}


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of each page, of the reports behind them, and of their badges."""
    matrix = Matrix.from_json(read("matrix.json"))
    before = {newer.subject.name: (older, newer) for older, newer in releases(matrix.rows)}
    judged = [row for row in matrix.rows if row.marks]
    yield "results/index.md", _index(matrix, judged)
    yield "results/releases.md", _releases(matrix)
    for row in judged:
        name = file_name(row.subject.name)
        report = Report.from_json(read(f"reports/{name}.json"))
        yield f"results/releases/{name}.md", _release(row, report, before.get(row.subject.name, ())[:1])
        yield f"results/reports/{name}.html", render(report, "html")
        yield f"results/badges/{name}.json", badge.render(report)
    yield "results/architectures.md", _architectures()
    yield from measured_pages.pages()
    yield SCRIPT, template("page.js").render()


def _index(matrix: Matrix, judged: Sequence[Row]) -> str:
    newest = next(row for row in judged if row.subject.implementation.startswith("peft=="))
    worse = [step for step in steps(matrix.rows) if step.worse]
    swept = [(path.stem, _swept(path)) for path in _sweeps()]
    lines = [
        "# Results\n",
        "What `kbitcheck` found in the preparations that people use, and in every architecture. Each mark links to the report",
        "behind it. A workflow renews the tables every night, and opens one issue when a row gets worse; `make results` renews them anywhere.\n",
        f"* [Releases and rules](releases.md): {len(judged)} implementations on {len(matrix.cases)} cases. The newest release,",
        f"  [{newest.subject.name}](releases/{file_name(newest.subject.name)}.md), {_summary(newest)}.",
        f"  {len(worse)} rules got worse from one release to the next.",
        f"* [Architectures](architectures.md): {sum(map(len, (rows for _, rows in swept)))} audits of architectures, by task and quantization.",
        "* [Trainers](trainers.md): real runs of each trainer's own command, watched.",
        "* [Adapter types](../adapter-types.md): every type of PEFT's on each quantization that trains here.",
        "* [Several processes, trainers, compilers](../composition.md): what works together, and with whose fault what does not.",
        "* [Memory and time](memory-and-time.md): forecasts beside a GPU, and what audits cost.\n",
        "## Badges\n",
        "`results/badges/NAME.json` beside these pages is what a badge service reads, for each row of the matrix; of a report of your own,",
        "`kbitcheck badge REPORT.json` writes it.\n",
        *table(
            ("implementation", "badge"),
            [(row.subject.name, f"`results/badges/{file_name(row.subject.name)}.json`") for row in judged],
        ),
    ]
    return "\n".join(lines) + "\n"


def _summary(row: Row) -> str:
    counts = {mark: sum(each is mark for each in row.marks.values()) for mark in Mark}
    broken = " and ".join(f"{counts[mark]} {mark.name}" for mark in (Mark.MUST, Mark.SHOULD) if counts[mark])
    parts = [f"breaks {broken}"] if broken else []
    parts += [f"leaves {counts[Mark.ERROR]} that could not be judged"] if counts[Mark.ERROR] else []
    kept = f"keeps {'' if parts else 'all '}{counts[Mark.KEPT]}"
    return " and ".join([", ".join(parts), kept]) if parts else kept


def _releases(matrix: Matrix) -> str:
    codes, uniform = columns(matrix)
    registered = rules()

    def cell(row: Row, rule: str) -> Cell:
        if rule not in row.marks:
            return Cell("")
        mark = row.marks[rule]
        link = f"releases/{file_name(row.subject.name)}.html#{rule.lower()}" if mark in BAD else ""
        return mark_cell(mark, link)

    contents = Sortable(
        caption="Implementations and rules",
        columns=("implementation", "transformers", *codes),
        rows=[
            [
                Cell(row.subject.name, link=f"releases/{file_name(row.subject.name)}.html"),
                Cell(row.versions.get("transformers", "")),
                *(cell(row, rule) for rule in codes),
            ]
            for row in matrix.rows
            if row.marks
        ],
        chosen=("transformers",),
        titles={rule: registered[rule].requirement for rule in codes if rule in registered},
    )
    out = [
        "# Releases and rules\n",
        f"Each implementation on the same cases ({', '.join(map(code, matrix.cases))}), in an environment of its own. A rule with the same mark",
        "in every row has no column. Click a heading to sort; a mark leads to what broke, and from there to the whole report.\n",
        sortable(contents, "table-releases"),
        "",
        *(f"{line[0].upper()}{line[1:]}.\n" for line in uniform),
        "## What changed from release to release\n",
    ]
    changed = steps(matrix.rows)
    for heading, of_kind in (("Worse", [s for s in changed if s.worse]), ("Better", [s for s in changed if s.better])):
        out += [
            f"### {heading}\n",
            *(table(("release", "rule", "now", "before"), map(_step, of_kind)) or ["Nothing."]),
            "",
        ]
    if missing := [row for row in matrix.rows if row.error]:
        out += [
            "## Not in the table\n",
            *(f"* {row.subject.name}: {rule_pages.prose(row.error)}" for row in missing),
            "",
        ]
    return "\n".join([*out, f"Made by {code(matrix.command)} ({matrix.tool}).", ""])


def _step(step: Step) -> tuple[str, ...]:
    page = f"[{step.after}](releases/{file_name(step.after)}.md)"
    return (
        page,
        f"[{rules().title(step.rule)}](../rules/{step.rule}.md)",
        HTML_WORDS[step.now],
        f"{HTML_WORDS[step.was]} in {step.before}",
    )


def _release(row: Row, report: Report, before: Sequence[Row]) -> str:
    name = file_name(row.subject.name)
    stack = ", ".join(
        f"{key} {value}" for key, value in row.versions.items() if isinstance(value, str) and value and key != "device"
    )
    out = [
        f"# {row.subject.name}\n",
        f"{row.subject.name} {_summary(row)}. [The whole report](../reports/{name}.html) · [all implementations](../releases.md)\n",
        f"Run with {stack}.\n",
    ]
    for older in before:
        out += [f"## What changed against {older.subject.name}\n", *_changes(older, row), ""]
    out += ["## What it breaks\n"] + ([] if any(mark in BAD for mark in row.marks.values()) else ["Nothing.\n"])
    for mark in BAD:
        for rule in sorted(rule for rule, of_rule in row.marks.items() if of_rule is mark):
            out += [
                f"### {rule} {{ #{rule.lower()} }}\n",
                f"[{rules().title(rule)}](../../rules/{rule}.md), {NAMED[mark]}.\n",
            ]
            out += [f"* `{case}`: {rule_pages.prose(evidence)}" for case, evidence in row.broken[rule].items()]
            out.append("")
    findings = [result for result in report.results if result.status is Status.FAIL and result.finding]
    if findings:
        out += ["## Findings that do not count against it\n", *_findings(findings), ""]
    return "\n".join(out)


def _changes(older: Row, newer: Row) -> list[str]:
    changed = steps([older, newer])
    if not changed:
        return ["No mark."]
    words = {True: "worse", False: "better"}
    return [
        f"* [{rules().title(s.rule)}](../../rules/{s.rule}.md): {HTML_WORDS[s.was]} before, {HTML_WORDS[s.now]} now"
        + (f" ({words[s.worse]})" if s.worse or s.better else "")
        for s in changed
    ]


def _findings(results: Sequence[Result]) -> list[str]:
    by_script: dict[str, set[str]] = {}
    for result in results:
        by_script.setdefault(str(result.finding), set()).add(result.rule)
    return [
        f"* {rule_pages.linked(script).replace(UP, UP_TWICE)}: {', '.join(sorted(codes))}"
        for script, codes in by_script.items()
    ]


def _sweeps() -> list[Path]:
    return sorted((RESULTS / "sweep").glob("*.json"))


def _swept(path: Path) -> list[Architecture]:
    return [Architecture.from_json(row) for row in read(f"sweep/{path.name}")["rows"]]


def _first_failure(row: Architecture) -> str:
    """Where a row breaks its gravest rule, the implementation's before others'; empty for a table that kept none."""
    shown = [finding for finding in row.findings if finding.where]
    shown.sort(key=lambda finding: (finding.level is not Level.MUST, finding.party is not Party.IMPLEMENTATION))
    return SHORT.text(f"{shown[0].rule}: {shown[0].where}: {shown[0].actual}") if shown else ""


def _architectures() -> str:
    rows: list[list[Cell]] = []
    for path in _sweeps():
        data = read(f"sweep/{path.name}")
        task, quant = str(data["task"]), str(data["options"]["quant"])
        for row in _swept(path):
            own = html_row(row)
            rows.append([own[0], Cell(task), Cell(quant), *own[1:-1], Cell(_first_failure(row)), own[-1]])
    rows.sort(key=lambda row: (row[0].text, row[1].text))  # quantizations of one architecture stand together
    contents = Sortable(
        caption="Architectures",
        columns=(COLUMNS[0], "task", "quantization", *COLUMNS[1:], "a first failure", "why not whole"),
        rows=rows,
        chosen=("task", "quantization", "loads", "prepares", "trains", "checkpointing"),
    )
    out = [
        "# Architectures\n",
        "Each architecture that transformers lists for a task, shrunk, with random weights, quantized and prepared by PEFT. A code with an",
        "exclamation mark is a MUST; what it is counted against stands before it. [How it is made](../sweep.md).\n",
        sortable(contents, "table-architectures"),
        "",
    ]
    return "\n".join(out)
