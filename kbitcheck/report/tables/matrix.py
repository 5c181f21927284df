"""The conformance matrix as text, Markdown, HTML or JSON. Columns that are alike in every row are told in a line instead."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from kbitcheck.compare.matrix import Mark, Matrix, Row
from kbitcheck.core.rule import rules

PACKAGES = ("transformers", "torch", "bitsandbytes", "accelerate")
SIGNS = {Mark.SKIPPED: "-", Mark.KEPT: ".", Mark.SHOULD: "should", Mark.MUST: "MUST", Mark.ERROR: "error"}
WORDS = {
    Mark.SKIPPED: "n/a",
    Mark.KEPT: "kept",
    Mark.SHOULD: "**SHOULD**",
    Mark.MUST: "**MUST**",
    Mark.ERROR: "**error**",
}


def render(matrix: Matrix, form: str) -> str:
    """The table in one of the formats of ``kbitcheck.compare.matrix.Format``."""
    return {"text": _text, "json": _json, "markdown": _markdown, "html": _html}[form](matrix)


def verdict(rows: Sequence[Row]) -> str:
    """One line: what each row broke."""
    return "; ".join(f"{row.subject.name}: {_told(row)}" for row in rows)


def _told(row: Row) -> str:
    if row.error:
        return f"error: {row.error}"
    parts = [
        f"{mark.value}: {' '.join(codes)}" for mark in reversed(Mark) if (codes := _with(row, mark)) and mark in BAD
    ]
    kept = len(_with(row, Mark.KEPT))
    return ", ".join([*parts, f"{kept} kept"]) + ("" if row.complete else ", interrupted")


BAD = (Mark.SHOULD, Mark.MUST, Mark.ERROR)


def _with(row: Row, mark: Mark) -> list[str]:
    return sorted(code for code, found in row.marks.items() if found is mark)


def columns(matrix: Matrix) -> tuple[list[str], dict[Mark, list[str]]]:
    """The rules worth a column, and the rest: by mark, those that have it in every row."""
    judged = [row for row in matrix.rows if row.marks]
    told: list[str] = []
    alike: dict[Mark, list[str]] = {}
    for code in matrix.rules:
        marks = {row.marks.get(code) for row in judged}
        mark = marks.pop() if len(marks) == 1 else None
        if mark in (Mark.KEPT, Mark.SKIPPED):
            alike.setdefault(mark, []).append(code)
        else:
            told.append(code)
    return told, alike


def _json(matrix: Matrix) -> str:
    return json.dumps(matrix.as_json(), indent=1) + "\n"


def _cells(row: Row, codes: Sequence[str], words: dict[Mark, str]) -> list[str]:
    versions = row.versions.get("transformers", "")
    marks = [row.marks.get(code) for code in codes]
    return [row.subject.name, versions, *("" if mark is None else words[mark] for mark in marks)]


def _text(matrix: Matrix) -> str:
    codes, alike = columns(matrix)
    lines = [["", "transformers", *codes], *(_cells(row, codes, SIGNS) for row in matrix.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"{name}: {told}" for row in matrix.rows for name, told in _unjudged(row)]
    return "\n".join([*table, "", *_alike(alike), *notes, _cases(matrix)]) + "\n"


def _unjudged(row: Row) -> Iterator[tuple[str, str]]:
    """Why a row, or some of its cells, could not be judged; a reason that many rules share once."""
    if row.error:
        yield row.subject.name, row.error
    reasons: dict[str, list[str]] = {}
    for code in _with(row, Mark.ERROR):
        for told in dict.fromkeys(row.broken[code].values()):
            reasons.setdefault(told, []).append(code)
    for told, codes in reasons.items():
        yield row.subject.name, f"{' '.join(codes)}: {told}"


def _alike(alike: dict[Mark, list[str]]) -> Iterator[str]:
    for mark, told in ((Mark.KEPT, "kept by every one"), (Mark.SKIPPED, "not applicable to these cases")):
        if mark in alike:
            yield f"{told}: {' '.join(alike[mark])}"


def _cases(matrix: Matrix) -> str:
    return f"cases: {' '.join(matrix.cases)}"


def _stack(matrix: Matrix) -> str:
    """What all rows ran on alike."""
    found = [{row.versions.get(name, "") for row in matrix.rows if row.versions} for name in ("python", *PACKAGES[1:])]
    names = ("python", *PACKAGES[1:])
    return ", ".join(f"{name} {', '.join(sorted(v))}" for name, v in zip(names, found, strict=True) if any(v))


def _markdown(matrix: Matrix) -> str:
    codes, alike = columns(matrix)
    head = ["implementation", "transformers", *codes]
    lines = [
        "# Conformance matrix",
        "",
        f"`{matrix.command}`",
        "",
        f"{matrix.tool}, {_stack(matrix)}; {_cases(matrix)}.",
        "",
    ]
    lines += [
        _line(head),
        _line(["---"] * len(head)),
        *(_line(_cells(row, codes, WORDS)) for row in matrix.rows if row.marks),
        "",
    ]
    known = rules()
    lines += [f"* {code}: {known[code].requirement}" for code in codes if code in known]
    lines += ["", *(f"{line[0].upper()}{line[1:]}." for line in _alike(alike))]
    notes = [f"* `{name}`: {_escaped(told)}" for row in matrix.rows for name, told in _unjudged(row)]
    return "\n".join([*lines, *(["", "Not judged:", "", *notes] if notes else [])]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _html(matrix: Matrix) -> str:
    from kbitcheck.report.html import template

    codes, alike = columns(matrix)
    told = {code: rule.requirement for code, rule in rules().items()}
    rows = [_cells(row, codes, SIGNS) for row in matrix.rows]
    unjudged = [told for row in matrix.rows for told in _unjudged(row)]
    return template("matrix").render(
        matrix=matrix,
        codes=codes,
        rows=rows,
        alike=list(_alike(alike)),
        rules=told,
        stack=_stack(matrix),
        unjudged=unjudged,
    )
