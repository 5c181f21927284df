"""The conformance matrix as text, Markdown, HTML or JSON. A rule with the same mark in every row has no column."""

import json
from collections.abc import Iterator, Mapping, Sequence

from kbitcheck.compare.matrix import Mark, Matrix, Row
from kbitcheck.compare.releases import Step, releases, steps
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.limits import SHORT
from kbitcheck.report.parts.markup import html, table
from kbitcheck.report.parts.sortable import Cell, Sortable
from kbitcheck.report.tables import aligned
from kbitcheck.report.templates import template

HEAD = ("implementation", "transformers")
STACK = ("python", "torch", "bitsandbytes", "accelerate")
NAMED = 3  # implementations in the line that sums a table up
BAD = (Mark.MUST, Mark.ERROR, Mark.SHOULD)
SIGNS = {Mark.SKIPPED: "-", Mark.KEPT: ".", Mark.SHOULD: "should", Mark.MUST: "MUST", Mark.ERROR: "error"}
HTML_WORDS = {Mark.SKIPPED: "n/a", Mark.KEPT: "kept", Mark.SHOULD: "SHOULD", Mark.MUST: "MUST", Mark.ERROR: "error"}
WORDS = {
    Mark.SKIPPED: "n/a",
    Mark.KEPT: "kept",
    Mark.SHOULD: "**SHOULD**",
    Mark.MUST: "**MUST**",
    Mark.ERROR: "**error**",
}


def render(matrix: Matrix, form: str) -> str:
    """The table as ``text``, ``json``, ``markdown`` or ``html``."""
    if form == "json":
        return json.dumps(matrix.as_json(), indent=1) + "\n"
    return {"text": _text, "markdown": _markdown, "html": _html}[form](matrix)


def verdict(row: Row) -> str:
    """One line: the rules that the row breaks."""
    if row.error:
        return f"{row.subject.name}: error: {row.error}"
    parts = [f"{mark.value}: {' '.join(codes)}" for mark in BAD if (codes := _codes(row, mark))]
    parts += [f"{len(_codes(row, Mark.KEPT))} kept", *([] if row.complete else ["interrupted"])]
    return f"{row.subject.name}: {', '.join(parts)}"


def summary(matrix: Matrix) -> str:
    """One line: which implementations break a MUST, and how many rows were not wholly judged."""
    broken = [row.subject.name for row in matrix.rows if _codes(row, Mark.MUST)]
    errors = sum(bool(row.error or _codes(row, Mark.ERROR)) for row in matrix.rows)
    names = f" ({', '.join(broken[:NAMED])}{', …' if broken[NAMED:] else ''})" if broken else ""
    line = f"{len(broken)} of {len(matrix.rows)} implementations break a MUST{names}, {errors} not wholly judged"
    return line + ("" if all(row.complete for row in matrix.rows) else "; interrupted")


def _codes(row: Row, mark: Mark) -> list[str]:
    return sorted(code for code, of_code in row.marks.items() if of_code is mark)


def columns(matrix: Matrix) -> tuple[list[str], list[str]]:
    """The rules that have a column, and a line each for those that every row keeps and those that apply to none."""
    marks = {code: {row.marks.get(code) for row in matrix.rows if row.marks} for code in matrix.rules}
    lines = []
    for mark, words in ((Mark.KEPT, "kept by every one"), (Mark.SKIPPED, "not applicable to these cases")):
        if codes := [code for code in marks if marks[code] == {mark}]:
            lines.append(f"{words}: {' '.join(codes)}")
    return [code for code in marks if marks[code] not in ({Mark.KEPT}, {Mark.SKIPPED})], lines


def _cells(row: Row, codes: Sequence[str], words: Mapping[Mark, str]) -> list[str]:
    marks = [words[row.marks[code]] if code in row.marks else "" for code in codes]
    return [row.subject.name, row.versions.get("transformers", ""), *marks]


def _not_judged(matrix: Matrix) -> Iterator[tuple[str, str]]:
    """Rows that could not be judged in whole or in part, and why; a reason that many rules share once."""
    for row in matrix.rows:
        if row.error:
            yield row.subject.name, row.error
        reasons: dict[str, list[str]] = {}
        for code in _codes(row, Mark.ERROR):
            for reason in dict.fromkeys(row.broken[code].values()):
                reasons.setdefault(reason, []).append(code)
        for reason, codes in reasons.items():
            yield row.subject.name, f"{' '.join(codes)}: {reason}"


def _stack(matrix: Matrix) -> str:
    """The versions of the rows, each once."""
    versions = {name: {row.versions.get(name, "") for row in matrix.rows if row.versions} for name in STACK}
    return ", ".join(f"{name} {', '.join(sorted(several))}" for name, several in versions.items() if any(several))


def _text(matrix: Matrix) -> str:
    codes, uniform = columns(matrix)
    lines = aligned([["", HEAD[1], *codes], *(_cells(row, codes, SIGNS) for row in matrix.rows)])
    notes = [f"{name}: {reason}" for name, reason in _not_judged(matrix)]
    return "\n".join([*lines, "", *uniform, *notes, f"cases: {' '.join(matrix.cases)}"]) + "\n"


def _markdown(matrix: Matrix) -> str:
    codes, uniform = columns(matrix)
    registered = rules()
    lines = [
        "# Conformance matrix",
        "",
        f"`{matrix.command}`",
        "",
        f"{matrix.tool}, {_stack(matrix)}; cases: {' '.join(matrix.cases)}.",
        "",
        *table([*HEAD, *codes], [map(html, _cells(row, codes, WORDS)) for row in matrix.rows if row.marks]),
        "",
        *(f"* {code}: {registered[code].requirement}" for code in codes if code in registered),
        "",
        *(f"{line[0].upper()}{line[1:]}." for line in uniform),
    ]
    if notes := [f"* `{name}`: {html(reason)}" for name, reason in _not_judged(matrix)]:
        lines += ["", "Not judged:", "", *notes]
    return "\n".join(lines) + "\n"


def _html(matrix: Matrix) -> str:
    codes, uniform = columns(matrix)
    changed = steps(matrix.rows)
    return template("matrix.html").render(
        tool=matrix.tool,
        skip_to="rows",
        wide=True,
        matrix=matrix,
        stack=_stack(matrix),
        rows=_rows(matrix, codes),
        compared=any(True for _ in releases(matrix.rows)),
        worse=_steps("What got worse", [step for step in changed if step.worse]),
        better=_steps("What got better", [step for step in changed if step.better]),
        broken=_broken(matrix),
        codes=codes,
        uniform=uniform,
        requirements={code: rule.requirement for code, rule in rules().items()},
        not_judged=list(_not_judged(matrix)),
    )


def mark_cell(mark: Mark, link: str = "") -> Cell:
    """A mark as a cell, of which the worst sorts first."""
    return Cell(HTML_WORDS[mark], mark.name.lower(), key=str(len(Mark) - list(Mark).index(mark)), link=link)


def _rows(matrix: Matrix, codes: Sequence[str]) -> Sortable:
    registered = rules()
    return Sortable(
        caption="Every row and every rule",
        columns=(*HEAD, *codes),
        rows=[
            [
                Cell(row.subject.name),
                Cell(row.versions.get("transformers", "")),
                *(mark_cell(row.marks[code]) if code in row.marks else Cell("") for code in codes),
            ]
            for row in matrix.rows
        ],
        chosen=("transformers",),
        titles={code: registered[code].requirement for code in codes if code in registered},
    )


def _steps(caption: str, changed: Sequence[Step]) -> Sortable:
    """Rules whose mark changed from a release to the next."""
    return Sortable(
        caption=caption,
        columns=("release", "rule", "now", "before", "the release before", "evidence"),
        rows=[
            [
                Cell(step.after), Cell(rules().title(step.rule)), mark_cell(step.now), mark_cell(step.was), Cell(step.before),
                Cell(SHORT.text(step.evidence)),
            ]
            for step in changed
        ],
        chosen=("release", "now"),
        cards=True,
    )  # fmt: skip


def _broken(matrix: Matrix) -> Sortable:
    """What each row breaks, and the evidence of its first case; the worst first."""
    broken = [
        (row, code, row.marks[code], by_case) for row in matrix.rows for code, by_case in row.broken.items() if by_case
    ]
    broken.sort(key=lambda entry: BAD.index(entry[2]))
    return Sortable(
        caption="What is broken, and how",
        columns=(HEAD[0], "rule", "mark", "cases", "evidence"),
        rows=[
            [
                Cell(row.subject.name), Cell(rules().title(code)), mark_cell(mark), Cell(str(len(by_case))),
                Cell(SHORT.text(next(iter(by_case.values())))),
            ]
            for row, code, mark, by_case in broken
        ],
        chosen=(HEAD[0], "mark"),
        cards=True,
    )  # fmt: skip
