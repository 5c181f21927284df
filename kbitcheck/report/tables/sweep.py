"""The table of a sweep as text, Markdown, HTML or JSON."""

import json
from collections.abc import Sequence

from kbitcheck.compare.sweep import Finding, Row, Table
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.core.result import Level, Party
from kbitcheck.core.version import TOOL
from kbitcheck.report.parts.limits import SHORT
from kbitcheck.report.parts.markup import html, table
from kbitcheck.report.parts.sortable import Cell, Sortable
from kbitcheck.report.tables import aligned
from kbitcheck.report.templates import template

COLUMNS = (
    "architecture", "inputs", "loads", "prepares", "trains", "quantized", "after/bf16", "checkpointing", "dead adapters", "findings",
)  # fmt: skip
YES_OR_NO = {True: "yes", False: "no", None: ""}
VERSIONS = ("python", "torch", "transformers", "bitsandbytes", "peft")
FORMATS = ("text", "json", "markdown", "html")


def render(sweep: Table, form: str) -> str:
    """The table in one of ``FORMATS``."""
    if form == "json":
        return json.dumps(sweep.as_json(), indent=1) + "\n"
    return {"text": _text, "markdown": _markdown, "html": _html}[form](sweep)


def verdict(sweep: Table) -> str:
    """One line: how many architectures were selected and audited, and with which result."""
    audited = [row for row in sweep.rows if row.loads]
    return (
        f"{len(audited)} of {sweep.selected} {sweep.task} architectures audited, "
        f"{sum(row.nonconforming for row in audited)} with a broken MUST of the implementation, "
        f"{sum(row.broken for row in sweep.rows)} not wholly judged"
        + (
            f", {sweep.left_out} left out, which have nothing that the quantization's options name"
            if sweep.left_out
            else ""
        )
    ) + ("" if sweep.complete else "; interrupted")


def cells(row: Row, shared: Sequence[Finding] = ()) -> tuple[str, ...]:
    """A row's cells, in the order of ``COLUMNS``; without the findings that all rows share."""
    keys = {_key(finding) for finding in shared}
    dead = "" if row.adapters is None else f"{row.dead_adapters} of {row.adapters}" if row.dead_adapters else "none"
    return (
        row.architecture,
        row.inputs,
        YES_OR_NO[row.loads],
        YES_OR_NO[row.prepares],
        YES_OR_NO[row.trains],
        "" if row.quantized is None else f"{row.quantized:.0%}",
        "" if row.growth is None else f"{row.growth:.2f}",
        row.checkpointing,
        dead,
        codes([finding for finding in row.findings if _key(finding) not in keys]),
    )


def codes(findings: Sequence[Finding]) -> str:
    """Codes by the party that they are attributed to; a MUST has an exclamation mark."""
    of_party = {
        party: [f.rule + "!" * (f.level is Level.MUST) for f in findings if f.party is party] for party in Party
    }
    return "; ".join(f"{party.value}: {' '.join(names)}" for party, names in of_party.items() if names)


def common(rows: Sequence[Row]) -> tuple[Finding, ...]:
    """Findings that every audited row shares: they stand once above the table instead of in each row."""
    audited = [row for row in rows if row.loads]
    if len(audited) < 2:
        return ()
    shared = set.intersection(*({_key(finding) for finding in row.findings} for row in audited))
    return tuple(finding for finding in audited[0].findings if _key(finding) in shared)


def _key(finding: Finding) -> tuple[str, Party, Level]:
    return finding.rule, finding.party, finding.level


def _text(sweep: Table) -> str:
    shared = common(sweep.rows)
    lines = aligned([COLUMNS, *(cells(row, shared) for row in sweep.rows)])
    lines += ["", f"in every row: {codes(shared)}"] if shared else []
    if notes := [f"{row.architecture}: {row.reason}" for row in sweep.rows if row.reason]:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _markdown(sweep: Table) -> str:
    shared = common(sweep.rows)
    lines = [f"`{sweep.options.get('command', '')}`", "", f"{verdict(sweep)}. {_environment(sweep)}."]
    lines += ["", f"In every row: {codes(shared)}."] if shared else []
    lines += ["", *table(COLUMNS, [[html(cell) for cell in cells(row, shared)] for row in sweep.rows])]
    if notes := [f"* `{row.architecture}`: {html(row.reason)}" for row in sweep.rows if row.reason]:
        lines += ["", "Why a row is not whole:", "", *notes]
    return "\n".join(lines) + "\n"


def _environment(sweep: Table) -> str:
    return ", ".join(f"{name} {sweep.environment[name]}" for name in VERSIONS if sweep.environment.get(name))


def _html(sweep: Table) -> str:
    shared = common(sweep.rows)
    worst_first = sorted(sweep.rows, key=lambda row: (not row.nonconforming, not row.broken, row.trains is not False))
    table = Sortable(
        caption="Every architecture",
        columns=(*COLUMNS, "why not whole"),
        rows=[html_row(row, shared) for row in worst_first],
        chosen=("inputs", "loads", "prepares", "trains", "checkpointing"),
    )
    return template("sweep.html").render(
        tool=TOOL,
        skip_to="rows",
        wide=True,
        title=f"{sweep.task} architectures",
        verdict=verdict(sweep),
        sound=sweep.exit_code == EXIT_CONFORMS,
        environment=_environment(sweep),
        command=sweep.options.get("command", ""),
        shared=codes(shared),
        table=table,
    )


def html_row(row: Row, shared: Sequence[Finding] = ()) -> list[Cell]:
    """The cells, a "no" and what counts against the implementation marked; shares sort as numbers."""
    texts = dict(zip(COLUMNS, cells(row, shared), strict=True))
    states = dict.fromkeys([name for name in ("loads", "prepares", "trains") if texts[name] == "no"], "bad")
    states |= {
        "findings": "must" if row.nonconforming else "",
        "checkpointing": "bad" * (row.checkpointing == "broken"),
    }
    states["dead adapters"] = "warn" * bool(row.dead_adapters)
    return [*(Cell(text, states.get(name, "")) for name, text in texts.items()), Cell(SHORT.text(row.reason))]
