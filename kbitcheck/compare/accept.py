"""Writes a ledger: the results of a run become the accepted ones, and what people wrote stays."""

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import tomlkit
from tomlkit.items import Array, Table

from kbitcheck.compare.ledger import ENVIRONMENT, SCHEMA, Cell, Entry, Ledger, judges, options_of
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_NOTHING, Report
from kbitcheck.core.result import Result, Status

Block = tuple[Cell, str]  # an entry's text, and the first of its cells

# Comment lines right above an entry are about it.
BLOCK = re.compile(r"^(?:#[^\n]*\n)*[ \t]*\[\[ *accepted *\]\]", re.MULTILINE)
ABOUT = """\
# What `kbitcheck gate {implementation}` accepts. `--accept` rewrites it, and keeps comments, reasons, issues and dates.
# Each rule was judged on each case; what is listed neither as skipped nor as accepted passed.
"""


def accept(report: Report, before: str = "", *, name: str = "ledger") -> str:
    """The text of a ledger that accepts ``report``; ``before`` is the text of the one it replaces, or empty.

    An accepted cell keeps its entry. A new one gets an entry without a reason, and the gate fails until a person has
    written one; only kbitcheck's own findings bring their reason along. Where nothing changed, the text is the same.

    Raises:
        UsageError: the run was cut short, lacks cells or judged nothing, or ``before`` is no ledger.
    """
    cases = sorted({r.case for r in report.results})
    rules = sorted({r.rule for r in report.results})
    results = {(r.rule, r.case): r for r in report.results}
    cells = {(rule, case) for rule in rules for case in cases if judges(rule, case)}
    if not report.complete or results.keys() != cells:
        raise UsageError(f"{name} is not written: the run is not complete")
    if report.exit_code == EXIT_NOTHING:
        raise UsageError(f"{name} is not written: nothing was checked")
    implementation = report.subject.get("implementation", {}).get("name", "")
    old = Ledger.parse(before, name=name) if before else Ledger(name=name, implementation=implementation)
    starts = [m.start() for m in BLOCK.finditer(before)]
    head = before[: starts[0]] if starts else before
    document = tomlkit.parse(head or ABOUT.format(implementation=implementation))
    _set(document, schema=SCHEMA, implementation=implementation)
    _fill(document, "environment", {k: str(report.environment.get(k, "")) for k in ENVIRONMENT})
    spec: Mapping[str, Any] = next(iter(report.subject.get("cases", {}).values()), {})
    _fill(document, "options", options_of(spec))
    # A rule that no case of the run could judge, as one on a training script's own steps, says nothing here.
    judged = {r.rule for r in report.results if r.status is not Status.SKIP}
    _fill(document, "judged", {"rules": sorted(judged), "cases": cases})
    skips = [(r.case, r.rule) for r in report.results if r.status is Status.SKIP and r.rule in judged]
    by_case = groupby(sorted(skips), key=lambda cell: cell[0])
    _fill(document, "skipped", {case: [rule for _, rule in cells] for case, cells in by_case})
    blocks = [*_kept(before, starts, old, results), *_added(old, results)]
    texts = [text.strip("\n") + "\n" for _, text in sorted(blocks, key=lambda b: b[0])]
    return "\n".join([document.as_string().rstrip("\n") + "\n", *texts])


def _matches(entry: Entry, result: Result | None) -> bool:
    return result is not None and (result.status, result.attributed_to) == (entry.status, entry.attributed_to)


def _kept(before: str, starts: list[int], old: Ledger, results: Mapping[Cell, Result]) -> Iterator[Block]:
    """The blocks of the old ledger, without the cells that no longer match."""
    for entry, start, end in zip(old.accepted, starts, [*starts[1:], len(before)][: len(starts)], strict=True):
        cases = [case for case in entry.cases if _matches(entry, results.get((entry.rule, case)))]
        text = before[start:end]
        if len(cases) < len(entry.cases):
            block: Any = tomlkit.parse(text)
            for case in entry.cases:
                if case not in cases:
                    block["accepted"][0]["cases"].remove(case)
            text = block.as_string()
        if cases:
            yield (entry.rule, cases[0]), text


def _added(old: Ledger, results: Mapping[Cell, Result]) -> Iterator[Block]:
    """Blocks for cells without an entry, one for each rule, status, party and reason."""
    held = {(e.rule, case) for e in old.accepted for case in e.cases if _matches(e, results.get((e.rule, case)))}
    fresh = [r for cell, r in results.items() if cell not in held and r.status in (Status.FAIL, Status.ERROR)]

    def key(result: Result) -> tuple[str, ...]:
        party = result.attributed_to.value if result.attributed_to else ""
        return result.rule, result.status.value, party, result.finding

    for (rule, status, party, why), group in groupby(sorted(fresh, key=lambda r: (key(r), r.case)), key):
        cases = [r.case for r in group]
        yield (rule, cases[0]), _block(rule, status, party, why, cases)


def _block(rule: str, status: str, party: str, why: str, cases: list[str]) -> str:
    table = tomlkit.table()
    table.update({"rule": rule, "status": status, **({"attributed_to": party} if party else {}), "reason": why})
    table["cases"] = _list(cases)
    return tomlkit.dumps({"accepted": [table]})


def _fill(document: tomlkit.TOMLDocument, name: str, values: Mapping[str, Any]) -> None:
    """Make the table hold these values; those that it holds already keep their form and comments."""
    if not values and name not in document:
        return
    if name not in document:
        document.add(tomlkit.nl())
        document.add(name, tomlkit.table())
    table: Table = document[name]
    for key in [key for key in table if key not in values]:
        del table[key]
    _set(table, **values)


def _set(table: tomlkit.TOMLDocument | Table, **values: Any) -> None:
    for key, value in values.items():
        if key not in table or table[key] != value:
            table[key] = _list(value) if isinstance(value, list) else value


def _list(texts: list[str]) -> Array:
    """One line where it fits; codes a line for each family; else a text a line."""
    if len(texts) * 9 < 100 and all(len(text) < 6 for text in texts):
        return tomlkit.item(texts)
    codes = all(re.fullmatch(r"KB\d{3}", text) for text in texts)
    lines = [list(g) for _, g in groupby(texts, key=lambda t: t[:3] if codes else t)]
    rows = [", ".join(tomlkit.item(text).as_string() for text in line) for line in lines]
    parsed: Array = tomlkit.parse("a = [\n" + "".join(f"    {row},\n" for row in rows) + "]\n")["a"]
    return parsed
