"""What an audit would compute, as text or JSON."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from kbitcheck.core.facts import Passes
from kbitcheck.core.plan import Item, Plan
from kbitcheck.report.tables import aligned

FORMATS = ("text", "json")
COLUMNS = ("fact", "runs on", "passes", "seconds", "memory", "rules")
NAMES = {
    "forwards": "f", "backwards": "b", "float64_forwards": "f64", "float64_backwards": "b64", "float64_products": "p64",
    "copies": "copy", "calls": "call", "snapshots": "read", "predicted": "step",
}  # fmt: skip
LEGEND = (
    "f, b: forwards and backwards; f64, b64: those in float64; p64: products of each layer in float64; copy: of the model; "
    "call: of the implementation; read: of every bit; step: on tensors without numbers. "
    "Predicted for this machine; small models cost what their operators cost."
)
SHOWN = 4  # rules of a fact
WIDTH = 110


def render(plans: Sequence[Plan], form: str) -> str:
    """The plans in one of ``FORMATS``."""
    if form == "json":
        return json.dumps({"schema": 1, "plans": [plan.as_json() for plan in plans]}, indent=1) + "\n"
    return "".join(f"{line}\n" for plan in plans for line in _lines(plan)) + textwrap.fill(LEGEND, WIDTH) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    yield plan.case
    first = ("load and read", "", "", _seconds(plan.opening), "", "")
    total = ("in all", "", _passes(plan.passes), _seconds(plan.seconds), _memory(plan.nbytes), "")
    table = [COLUMNS, *([first] if plan.opening else []), *map(_row, plan.kept), total]
    yield from (f"  {line}" for line in aligned(table))
    listed: set[str] = set()
    for reason in dict.fromkeys(item.left_out for item in plan.items if item.left_out):
        without = [item for item in plan.items if item.left_out == reason]
        rules = [rule for rule in dict.fromkeys(r for item in without for r in item.rules) if rule not in listed]
        listed.update(rules)
        yield from textwrap.wrap(
            f"{' '.join(rules) or 'others too'} {reason}",
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
        )
    yield ""


def _row(item: Item) -> tuple[str, ...]:
    shared = " (shared)" if item.shared else ""
    return (
        item.fact + shared, item.on, _passes(item.passes), _seconds(item.seconds), _memory(item.nbytes), _rules(item)
    )  # fmt: skip


def _passes(passes: Passes) -> str:
    return " ".join(f"{number} {NAMES[name]}" for name, number in asdict(passes).items() if number)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _memory(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes > 1e8 else f"{nbytes / 1e6:.1f} MB"


def _rules(item: Item) -> str:
    rest = len(item.rules) - SHOWN
    return " ".join(item.rules[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
