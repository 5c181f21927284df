"""``kbitcheck badge`` writes the badge of a saved report."""

from __future__ import annotations

import json

from tests.cli.conftest import Door

ONE = ("--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off", "--format", "json", "--output", "r.json")


def test_a_report_becomes_a_badge(door: Door) -> None:
    for subject, message, color in (("good", "conforms", "brightgreen"), ("nothing", "does not conform", "red")):
        door("impl", f"{subject}.py:prepare", *ONE)
        ran = door("badge", "r.json")
        assert ran.returncode == 0
        assert json.loads(ran.stdout) == {"schemaVersion": 1, "label": "kbitcheck", "message": message, "color": color}
    assert door("badge", "r.json", "--output", "b.json").returncode == 0
    assert (door.cwd / "b.json").read_text() == ran.stdout
    assert door("badge", "none.json").returncode == 4
