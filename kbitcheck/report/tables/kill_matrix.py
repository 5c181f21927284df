"""The kill matrix: which rules each fault breaks, as a page in Markdown."""

from collections.abc import Sequence

from kbitcheck.core.events import FaultTried
from kbitcheck.core.rule import rules

HEAD = """# Kill matrix

Every fault in `kbitcheck/sabotage/`, judged by every rule. `kbitcheck selftest --matrix > docs/kill-matrix.md` writes this page;
its exit code is 1 if a fault is missed.

A fault is a broken *model* (`m`: damaged before or after a good preparation) a broken *implementation* (`i`), the broken *run* (`r`)
of a training script, or damage to what it *saved* (`s`). In a fault's row,
`#` marks the rule that must catch the fault, and `x` every other rule that the fault breaks. `!` after the letter means that no other
rule may fail. Read the head of a column from top to bottom. KB213, KB514 and KB515 are judged on their own faults alone, each under the
condition that it shows under.
"""


def page(tried: Sequence[FaultTried]) -> str:
    """The page of a selftest's events, rows in their order."""
    codes = list(rules())
    judged = [event for event in tried if event.kills is not None]
    wide = max((len(event.fault) for event in tried), default=0) + 8
    digits = [code.removeprefix("KB") for code in codes]
    lines = [" " * wide + "".join(digit[place] for digit in digits) for place in range(3)]
    for event in judged:
        kills = event.kills or ()
        marks = ("#" if c == event.code and c in kills else "x" if c in kills else "." for c in codes)
        name = f"{event.code.removeprefix('KB')} {event.level[0]}{'!' if event.alone else ' '} {event.fault} "
        lines.append(f"{name:{wide}}{''.join(marks)}")
    killed = sum(event.code in (event.kills or ()) for event in judged)
    unseen = [f"{event.code} {event.fault}: {event.reason}" for event in tried if event.kills is None]
    idle = [code for code in codes if not any(code in (event.kills or ()) for event in judged)]
    tail = [f"{killed} of {len(judged)} faults are caught by the rule that must."]
    tail += [f"Not judged on the machine that made this page: {', '.join(unseen)}."] if unseen else []
    tail += [f"Rules that caught nothing here: {', '.join(idle)}."] if idle else []
    return "\n".join([HEAD, "```", *lines, "```", "", *tail, ""])


def read(text: str) -> tuple[list[str], dict[str, set[str]]]:
    """What a page says: the rules of its columns, and what each fault, as ``KB203 norm_nudged``, broke."""
    lines = text.split("```")[1].strip("\n").splitlines()
    width = len(lines[0]) - len(lines[0].lstrip())
    codes = ["KB" + "".join(digits) for digits in zip(*(line[width:] for line in lines[:3]), strict=True)]
    kills = {}
    for line in lines[3:]:
        number, _, fault = line[:width].split()[:3]
        kills[f"KB{number} {fault}"] = {c for c, mark in zip(codes, line[width:], strict=True) if mark != "."}
    return codes, kills
