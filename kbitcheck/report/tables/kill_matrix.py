"""The kill matrix: which rules each fault breaks, one JSON file a rule, and as a page in Markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbitcheck.core.events import FaultTried
from kbitcheck.core.rule import rules

HEAD = """# Kill matrix

Every fault in `kbitcheck/sabotage/`, judged by every rule. `kbitcheck selftest --matrix docs/kill-matrix` writes what this page
is made of, one file a rule; its exit code is 1 if a fault is missed.

A fault is a broken *model* (`m`: damaged before or after a good preparation) a broken *implementation* (`i`), the broken *run* (`r`)
of a training script, or damage to what it *saved* (`s`). In a fault's row,
`#` marks the rule that must catch the fault, and `x` every other rule that the fault breaks. `!` after the letter means that no other
rule may fail. Read the head of a column from top to bottom. KB213, KB514 and KB515 are judged on their own faults alone, each under the
condition that it shows under.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What one fault of a rule broke; ``kills`` is None where the machine could not judge the fault, for ``reason``."""

    code: str
    fault: str
    level: str
    alone: bool
    kills: tuple[str, ...] | None
    reason: str = ""


def write(directory: Path, tried: Sequence[FaultTried]) -> None:
    """Write the file of each rule whose faults were tried."""
    directory.mkdir(parents=True, exist_ok=True)
    for code in {event.code for event in tried}:
        faults = {event.fault: _as_json(event) for event in tried if event.code == code}
        lines = (f"  {json.dumps(fault)}: {json.dumps(entry)}" for fault, entry in faults.items())
        (directory / f"{code}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _as_json(event: FaultTried) -> dict[str, Any]:
    if event.kills is None:
        return {"level": event.level, "reason": event.reason}
    return {"level": event.level} | ({"alone": True} if event.alone else {}) | {"kills": list(event.kills)}


def read(directory: Path) -> list[Row]:
    """The rows of a directory that ``write`` filled, by rule.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no such file.
    """
    return [row for file in sorted(directory.glob("KB*.json")) for row in _rows(file)]


def _rows(file: Path) -> Iterator[Row]:
    entries: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    for fault, entry in entries.items():
        kills = tuple(entry["kills"]) if "kills" in entry else None
        yield Row(file.stem, fault, entry["level"], entry.get("alone", False), kills, entry.get("reason", ""))


def page(rows: Sequence[Row]) -> str:
    """The page of these rows, in their order."""
    codes = list(rules())
    judged = [row for row in rows if row.kills is not None]
    wide = max((len(row.fault) for row in rows), default=0) + 8
    digits = [code.removeprefix("KB") for code in codes]
    lines = [" " * wide + "".join(digit[place] for digit in digits) for place in range(3)]
    for row in judged:
        kills = row.kills or ()
        marks = ("#" if c == row.code and c in kills else "x" if c in kills else "." for c in codes)
        name = f"{row.code.removeprefix('KB')} {row.level[0]}{'!' if row.alone else ' '} {row.fault} "
        lines.append(f"{name:{wide}}{''.join(marks)}")
    killed = sum(row.code in (row.kills or ()) for row in judged)
    unseen = [f"{row.code} {row.fault}: {row.reason}" for row in rows if row.kills is None]
    idle = [code for code in codes if not any(code in (row.kills or ()) for row in judged)]
    tail = [f"{killed} of {len(judged)} faults are caught by the rule that must."]
    tail += [f"Not judged on the machine that tried them: {', '.join(unseen)}."] if unseen else []
    tail += [f"Rules that caught nothing here: {', '.join(idle)}."] if idle else []
    return "\n".join([HEAD, "```", *lines, "```", "", *tail, ""])
