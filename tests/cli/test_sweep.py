"""The sweep as a user meets it: a row each, none lost, and one that goes on where it was interrupted."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest

from kbitcheck.compare.sweep import row
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from tests.cli.conftest import Door, heed
from tests.cli.test_interrupt import _workers

SOUND = ("--select", "llama", "--select", "gpt2", "--select", "opt")


def test_every_architecture_is_a_row(door: Door) -> None:
    ended = door("sweep", "--prepare", "good.py:prepare", "--format", "json", "--jobs", "2")
    table = json.loads(ended.stdout)
    assert [(r["architecture"], r["loads"]) for r in table["rows"]] == [
        ("gpt2", True), ("late", False), ("llama", True), ("opt", True),
    ]  # fmt: skip
    assert table["rows"][1]["reason"] == "late: the weights are truncated"
    assert table["rows"][0]["quantized"] == 0.5
    assert ended.returncode == 3
    assert "3 of 4 causal-lm architectures audited" in ended.stderr
    assert door.left() == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--prepare", "good.py:prepare", *SOUND), 0),
        (("--prepare", "nothing.py:prepare", *SOUND), 1),
        (("--prepare", "good.py:prepare", "--select", "late"), 3),
        (("--prepare", "killed.py:prepare", *SOUND), 3),
        (("--prepare", "nothing.py:prepare", *SOUND, "--select", "late"), 1),
        (("--prepare", "half_judged.py:prepare", *SOUND), 1),
        (("--prepare", "import_error.py:prepare", *SOUND), 4),
        (("--prepare", "good.py:prepare", "--select", "lama"), 4),
        (("--prepare", "good.py:prepare", "--shard", "3/2"), 4),
        (("--prepare", "good.py:prepare", "--quant", "nf5"), 4),
        (("--prepare", "good.py:prepare", "--select", "llama", "--shard", "2/2"), 5),
        (("--prepare", "good.py:prepare", "--task", "masked-lm"), 5),
    ],
    ids=lambda v: " ".join(v[1:]) if isinstance(v, tuple) else str(v),
)
def test_exit_codes(door: Door, arguments: tuple[str, ...], code: int) -> None:
    ended = door("sweep", *arguments)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert door.left() == []


def test_what_an_option_does_not_apply_to_is_left_out(door: Door) -> None:
    stacked = ("sweep", "--prepare", "good.py:prepare", "--quant", "nf4,experts=parametrize", "--format", "json")
    ended = door(*stacked, *SOUND)
    table = json.loads(ended.stdout)
    assert ([r["architecture"] for r in table["rows"]], table["left_out"], ended.returncode) == (["opt"], 2, 0)
    assert "1 of 3 causal-lm architectures audited" in ended.stderr
    assert "2 left out, which have nothing that the quantization's options name" in ended.stderr
    assert door(*stacked, "--select", "llama").returncode == 5


def test_one_that_hangs_is_a_row_with_its_reason(door: Door) -> None:
    ended = door("sweep", "--prepare", "hangs.py:prepare", "--select", "llama", "--timeout", "1", "--format", "json")
    (found,) = json.loads(ended.stdout)["rows"]
    assert not found["loads"]
    assert found["reason"].startswith("no result within 1 s")
    assert ended.returncode == 3


def test_shards_are_a_partition(door: Door) -> None:
    parts = [
        json.loads(door("sweep", "--prepare", "good.py:prepare", "--format", "json", "--shard", f"{i}/2").stdout)[
            "rows"
        ]
        for i in (1, 2)
    ]
    names = [r["architecture"] for part in parts for r in part]
    assert sorted(names) == ["gpt2", "late", "llama", "opt"]


def test_a_rerun_skips_what_is_done_and_other_options_start_anew(door: Door) -> None:
    same = ("sweep", "--prepare", "good.py:prepare", "--output", "table.md", "--format", "markdown")
    assert "rows are there already" not in door(*same, "--select", "llama").stderr
    again = door(*same, *SOUND)
    assert "1 of 3 rows are there already" in again.stderr
    assert "llama: audited" not in again.stderr
    assert "gpt2: audited" in again.stderr
    text = (door.cwd / "table.md").read_text()
    assert text.count("\n| ") == 5  # a head, a rule, three rows
    assert "--prepare good.py:prepare" in text
    other = door(*same, *SOUND, "--quant", "int8")
    assert "starting anew" in other.stderr
    assert "llama: audited" in other.stderr


def test_an_interrupted_sweep_keeps_its_rows(door: Door) -> None:
    (door.cwd / "slow.py").write_text(
        "import os, time\ndef prepare(model):\n"
        "    if os.path.exists('second'):\n        time.sleep(600)\n    open('second', 'w').close()\n    return model\n"
        "prepare.please = True\n"
    )
    arguments = ("sweep", "--prepare", "slow.py:prepare", "--output", "t.json", "--format", "json", *SOUND)
    with door.start(*arguments, preexec_fn=heed) as process:
        assert process.stderr is not None
        before = iter(process.stderr.readline, "")
        assert any("gpt2: audited" in line for line in before)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 2, told
    assert [r["architecture"] for r in json.loads((door.cwd / "t.json").read_text())["rows"]] == ["gpt2"]
    assert _workers(door.scratch) == []
    (door.cwd / "slow.py").write_text((door.cwd / "good.py").read_text())
    again = door(*arguments)
    assert again.returncode == 0
    assert len(json.loads((door.cwd / "t.json").read_text())["rows"]) == 3


def _result(rule: str, status: Status, *failures: Observation, level: Level = Level.MUST) -> Result:
    return Result(rule=rule, case="c", level=level, status=status, failures=failures, reason="because")


def test_what_the_cells_of_a_row_mean() -> None:
    facts = {"parameters": 100, "quantized": 40, "bytes_prepared": 250, "adapters": 8, "dead_adapters": 2}
    model = Observation("x", "a", "b", ok=False, party=Party.MODEL, witness="the base")
    made = row("n", "C", "arch:n", [_result("KB309", Status.PASS), _result("KB401", Status.PASS)], facts)
    assert (made.quantized, made.growth, made.trains, made.checkpointing) == (0.4, 1.25, True, "works")
    assert not made.broken
    assert not made.nonconforming
    assert row("n", "C", "m", [_result("KB903", Status.FAIL, model)], facts).checkpointing == "unsupported"
    assert row("n", "C", "m", [_result("KB403", Status.FAIL, model)], facts).checkpointing == "broken"
    assert not row("n", "C", "m", [_result("KB210", Status.FAIL, model)], facts).nonconforming
    skipped = [_result("KB309", Status.SKIP), _result("KB105", Status.PASS)]
    assert row("n", "C", "m", skipped, facts).trains is True


def test_what_preparation_raised_is_told_once() -> None:
    raised = Observation("prepare(model, ...)", "returns", "raised ValueError: no", ok=False)
    found = row(
        "n",
        "C",
        "m",
        [_result("KB502", Status.FAIL, raised), replace(_result("KB101", Status.ERROR), raised="ValueError: no")],
        {"parameters": 1, "quantized": 0},
    )
    assert found.prepares is False
    assert found.reason == "ValueError: no"
    assert not found.broken
    assert found.nonconforming


def test_a_model_that_cannot_run_trains_not_and_says_why() -> None:
    stopped = replace(_result("KB309", Status.SKIP), raised="RuntimeError: in place")
    found = row("n", "C", "m", [stopped], {"parameters": 1, "quantized": 0})
    assert found.trains is False
    assert found.reason == "RuntimeError: in place"
    assert not found.broken
