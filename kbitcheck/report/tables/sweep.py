"""The table of a sweep as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from kbitcheck.core.result import Level, Party
from kbitcheck.run.sweep import Finding, Row, Table

COLUMNS = (
    "architecture", "inputs", "loads", "prepares", "trains", "quantized", "after/bf16", "checkpointing", "dead adapters", "findings",
)  # fmt: skip
FORMATS = ("text", "json", "markdown")


def render(table: Table, form: str) -> str:
    """The table in one of ``FORMATS``."""
    return {"text": _text, "markdown": _markdown, "json": _json}[form](table)


def verdict(table: Table) -> str:
    """One line: how many were selected, audited and what came of them."""
    audited = [r for r in table.rows if r.loads]
    return (
        f"{len(audited)} of {table.selected} {table.task} architectures audited, "
        f"{sum(r.nonconforming for r in audited)} with a broken MUST of the implementation, "
        f"{sum(r.broken for r in table.rows)} not wholly judged"
    ) + ("" if table.complete else "; interrupted")


def _json(table: Table) -> str:
    return json.dumps(table.as_json(), indent=1) + "\n"


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells, in the order of ``COLUMNS``."""
    dead = "" if row.adapters is None else f"{row.dead_adapters} of {row.adapters}" if row.dead_adapters else "none"
    return (
        row.architecture,
        row.inputs,
        _mark(row.loads),
        _mark(row.prepares),
        _mark(row.trains),
        "" if row.quantized is None else f"{row.quantized:.0%}",
        "" if row.growth is None else f"{row.growth:.2f}",
        row.checkpointing,
        dead,
        findings(row.findings),
    )


def findings(found: Sequence[Finding]) -> str:
    """Codes by whose they are; a MUST has an exclamation mark."""
    parts = []
    for party in Party:
        codes = [f.rule + "!" * (f.level is Level.MUST) for f in found if f.party is party]
        if codes:
            parts.append(f"{party.value}: {' '.join(codes)}")
    return "; ".join(parts)


def common(rows: Sequence[Row]) -> tuple[Finding, ...]:
    """Findings that every audited row shares: told once instead of in each row."""
    audited = [r for r in rows if r.loads]
    if len(audited) < 2:
        return ()
    shared = set.intersection(*({(f.rule, f.party, f.level) for f in r.findings} for r in audited))
    return tuple(f for f in audited[0].findings if (f.rule, f.party, f.level) in shared)


def _mark(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _own(table: Table) -> tuple[list[tuple[str, ...]], str]:
    """The cells less what all rows share, and that."""
    shared = common(table.rows)
    keys = {(f.rule, f.party, f.level) for f in shared}
    rows = []
    for row in table.rows:
        *rest, _ = cells(row)
        rows.append((*rest, findings([f for f in row.findings if (f.rule, f.party, f.level) not in keys])))
    return rows, findings(shared)


def _notes(table: Table) -> list[tuple[str, str]]:
    return [(row.architecture, row.reason) for row in table.rows if row.reason]


def _text(table: Table) -> str:
    rows, shared = _own(table)
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (COLUMNS, *rows)
    ]
    if shared:
        lines += ["", f"in every row: {shared}"]
    if notes := _notes(table):
        lines += ["", *(f"{name}: {reason}" for name, reason in notes)]
    return "\n".join(lines) + "\n"


def _markdown(table: Table) -> str:
    rows, shared = _own(table)
    environment = ", ".join(
        f"{name} {table.environment[name]}"
        for name in ("python", "torch", "transformers", "bitsandbytes", "peft")
        if table.environment.get(name)
    )
    lines = [f"`{table.options.get('command', '')}`", "", f"{verdict(table)}. {environment}."]
    if shared:
        lines += ["", f"In every row: {shared}."]
    lines += ["", _line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, rows)]
    if notes := _notes(table):
        lines += ["", "Why a row is not whole:", "", *(f"* `{n}`: {_escaped(r)}" for n, r in notes)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
