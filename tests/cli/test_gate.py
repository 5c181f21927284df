"""The gate and the comparison of reports from the outside: files, exit codes, lines."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Door, heed

ONE = ("--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off")
HERE = (*ONE, "--in-process")  # where it is not the process that is tested


def explained(path: Path) -> None:
    path.write_text(path.read_text().replace('reason = ""', 'reason = "known"'))


def test_a_ledger_is_made_explained_held_and_broken(door: Door) -> None:
    ledger = door.cwd / "ledger.toml"
    made = door("gate", "rude.py:prepare", "--ledger", "ledger.toml", "--accept", *HERE)
    assert made.returncode == 0, made.stderr
    assert "accepted: new KB201" in made.stderr
    assert "unexplained KB201" in made.stdout
    first = ledger.read_text()
    unexplained = door("gate", "rude.py:prepare", "--ledger", "ledger.toml", *HERE)
    assert unexplained.returncode == 1
    assert "✗ unexplained KB201 says-please [tiny:llama-nf4-off]: ledger.toml:" in unexplained.stdout
    explained(ledger)
    stamp = ledger.stat().st_mtime_ns
    for again in ((), ("--accept",)):
        ran = door("gate", "rude.py:prepare", "--ledger", "ledger.toml", *again, *HERE)
        assert (ran.returncode, "nothing changed" in ran.stderr) == (0, True), ran.stdout
    assert ledger.stat().st_mtime_ns == stamp
    assert ledger.read_text() == first.replace('reason = ""', 'reason = "known"')
    worse = door("gate", "nothing.py:prepare", "--ledger", "ledger.toml", *HERE)
    assert worse.returncode == 1
    assert "✗ regressed KB103 returns [tiny:llama-nf4-off]: was PASS in the ledger, now FAIL" in worse.stdout
    better = door("gate", "good.py:prepare", "--ledger", "ledger.toml", *HERE)
    assert better.returncode == 1
    assert "✗ stale KB201" in better.stdout
    narrower = door("gate", "rude.py:prepare", "--ledger", "ledger.toml", "--select", "KB1", *HERE)
    assert narrower.returncode == 1
    assert "✗ unselected KB201, KB901 [tiny:llama-nf4-off]: left out by --select" in narrower.stdout
    assert door("gate", "rude.py:prepare", "--ledger", "ledger.toml", *HERE, "--ignore", "KB201=later").returncode == 0
    broken = door("gate", "raises.py:prepare", "--ledger", "ledger.toml", *HERE)
    assert broken.returncode == 1
    assert "ValueError: no" in broken.stdout
    assert [p for p in door.left() if not p.endswith("ledger.toml")] == []


RULE = '"KB901"]'
CASE = '"tiny:llama-nf4-off",\n]\n\n[[accepted]]'
BREACHES = [
    # What is done to a ledger that rude.py keeps; who is run; what comes of it.
    ("new", "[judged]", '[skipped]\n"tiny:llama-nf4-off" = ["KB103"]\n\n[judged]', "nothing", "was SKIP in the ledger"),
    ("new", '"KB103", ', "", "nothing", "KB103 returns [tiny:llama-nf4-off]: not in the ledger"),
    ("expired", 'reason = "known"', 'reason = "known"\nexpires = 2020-01-31', "rude", "accepted until 2020-01-31"),
    ("unknown", RULE, f'"KB899", {RULE}', "rude", "there is no rule KB899"),
    ("unknown", CASE, f'"tiny:lama-nf4-off", {CASE}', "rude", "there is no recipe tiny:lama"),
]


@pytest.mark.parametrize(("kind", "old", "new", "subject", "told"), BREACHES, ids=[f"{b[0]}-{b[4]}" for b in BREACHES])
def test_each_breach_is_named(door: Door, kind: str, old: str, new: str, subject: str, told: str) -> None:
    """The others are in the story above. ``--accept`` takes each away, and then there is nothing left to tell."""
    ledger = door.cwd / "l.toml"
    command = ("--ledger", "l.toml", *HERE)
    door("gate", "rude.py:prepare", "--accept", *command)
    explained(ledger)
    text = ledger.read_text()
    assert text.count(old) == 1, text
    ledger.write_text(text.replace(old, new))
    ran = door("gate", f"{subject}.py:prepare", *command)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert f"✗ {kind} " in ran.stdout
    assert told in ran.stdout
    assert f"1 {kind}" in ran.stderr
    if kind == "unknown":
        assert door("gate", f"{subject}.py:prepare", "--accept", *command).returncode == 0
        assert ledger.read_text() == text


def test_what_a_configuration_leaves_out_is_not_lost_and_says_who_left_it_out(door: Door) -> None:
    (door.cwd / "kbitcheck.toml").write_text(
        'quants = ["nf4", "int8"]\nmodels = ["tiny:llama"]\ncheckpointing = ["off"]\n'
    )
    assert door("gate", "good.py:prepare", "--ledger", "l.toml", "--accept", "--in-process").returncode == 0
    (door.cwd / "kbitcheck.toml").write_text('quants = ["nf4"]\nmodels = ["tiny:llama"]\n')
    ran = door("gate", "good.py:prepare", "--ledger", "l.toml", "--checkpointing", "off", "--in-process")
    assert ran.returncode == 1
    lines = [line for line in ran.stdout.splitlines() if "tiny:llama-int8-off" in line]
    left_out = "left out by models, quants of kbitcheck.toml and --checkpointing; select it again"
    assert [(line.startswith("✗ unselected "), left_out in line) for line in lines] == [(True, True)]
    assert "lost" not in ran.stdout + ran.stderr
    again = ("gate", "good.py:prepare", "--ledger", "l.toml", "--checkpointing", "off", "--in-process")
    assert door(*again, "--accept").returncode == 0
    assert "int8" not in (door.cwd / "l.toml").read_text()
    assert door(*again).returncode == 0


WRONG = [
    ((), "say what to compare with"),
    (("--ledger", "a.toml", "--against", "good.py:prepare"), "say what to compare with"),
    (("--ledger", "none.toml"), "no ledger none.toml"),
    (("--ledger", "bad.toml"), "bad.toml:1: not TOML"),
    (("--ledger", "bad.toml", "--accept"), "bad.toml:1: not TOML"),
    (("--ledger", "no/such/place.toml", "--accept"), "cannot write --ledger no/such/place.toml"),
    (("--against", "good.py:prepare", "--accept"), "--against has none"),
    (("--against", "good.py:prepare", "--in-process"), "never share a process"),
    (("--against", "nowhere.py:prepare"), "no such file"),
    (("--ledger", "qlora.toml"), "accepted with --profile qlora"),
]


@pytest.mark.parametrize(("arguments", "told"), WRONG, ids=[" ".join(a) or "nothing" for a, _ in WRONG])
def test_wrong_usage_is_one_line(door: Door, arguments: tuple[str, ...], told: str) -> None:
    (door.cwd / "bad.toml").write_text("a = [")
    (door.cwd / "qlora.toml").write_text('schema = 1\n[options]\nprofile = "qlora"\n')
    before = sorted(p.name for p in door.cwd.iterdir())
    ran = door("gate", "good.py:prepare", *arguments, *ONE)
    assert (ran.returncode, ran.stderr.count("\n"), ran.stdout) == (4, 1, ""), ran.stderr
    assert told in ran.stderr
    assert sorted(p.name for p in door.cwd.iterdir()) == before


def test_a_run_that_broke_is_accepted_only_with_a_reason_and_one_that_checked_nothing_never(door: Door) -> None:
    ran = door("gate", "raises.py:prepare", "--ledger", "l.toml", "--accept", *HERE)
    assert ran.returncode == 0
    assert door("gate", "raises.py:prepare", "--ledger", "l.toml", *HERE).returncode == 1
    explained(door.cwd / "l.toml")
    assert door("gate", "raises.py:prepare", "--ledger", "l.toml", *HERE).returncode == 0
    nothing = door("gate", "good.py:prepare", "--ledger", "m.toml", "--accept", *HERE, "--select", "KB102")
    assert nothing.returncode == 5
    assert "nothing was checked" in nothing.stderr
    assert not (door.cwd / "m.toml").exists()


def test_an_interrupted_run_leaves_the_ledger_alone(door: Door) -> None:
    (door.cwd / "hangs.py").write_text(
        "import time\ndef prepare(model):\n    open('here', 'w').close()\n    time.sleep(600)\n"
    )
    door("gate", "rude.py:prepare", "--ledger", "l.toml", "--accept", *ONE)
    before = (door.cwd / "l.toml").read_bytes()
    arguments = ("gate", "hangs.py:prepare", "--ledger", "l.toml", "--accept", *ONE)
    with door.start(*arguments, preexec_fn=heed) as process:
        deadline = time.monotonic() + 30
        while not (door.cwd / "here").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "l.toml is not written" in err
    assert (door.cwd / "l.toml").read_bytes() == before


def test_another_implementation_is_the_yardstick(door: Door) -> None:
    same = door("gate", "rude.py:prepare", "--against", "rude:prepare", *ONE)
    assert (same.returncode, same.stdout.count("✗")) == (0, 0), same.stdout
    better = door("gate", "good.py:prepare", "--against", "rude.py:prepare", *ONE)
    assert better.returncode == 0
    assert "! fixed KB201" in better.stdout
    worse = door("gate", "nothing.py:prepare", "--against", "rude.py:prepare", *ONE)
    assert worse.returncode == 1
    assert (
        "✗ regressed KB103 returns [tiny:llama-nf4-off]: rude.py:prepare: PASS; nothing.py:prepare: FAIL"
        in worse.stdout
    )
    assert "KB201" not in worse.stdout
    assert door("gate", "hungry.py:prepare", "--against", "hungry.py:prepare", *ONE).returncode == 3


def test_the_two_preparations_never_share_a_process(door: Door) -> None:
    for name in ("one", "two"):
        source = f"import os\ndef prepare(model):\n    open('{name}.pid', 'a').write(f'{{os.getpid()}} ')\n    return model\n"
        (door.cwd / f"{name}.py").write_text(source)
    assert door("gate", "one.py:prepare", "--against", "two.py:prepare", *ONE).returncode == 0
    one, two = ({*(door.cwd / f"{name}.pid").read_text().split()} for name in ("one", "two"))
    assert one
    assert two
    assert not one & two


def test_two_saved_reports_are_compared(door: Door) -> None:
    for name in ("good", "nothing", "rude"):
        door("impl", f"{name}.py:prepare", *HERE, "--format", "json", "--output", f"{name}.json")
    assert door("diff", "good.json", "good.json").returncode == 0
    worse = door("diff", "good.json", "nothing.json")
    assert worse.returncode == 1
    assert "✗ regressed KB103 returns [tiny:llama-nf4-off]: good.json: PASS; nothing.json: FAIL" in worse.stdout
    assert "2 regressed" in worse.stderr
    better = door("diff", "rude.json", "good.json", "--format", "json")
    assert better.returncode == 0
    assert [b["kind"] for b in json.loads(better.stdout)["gate"]["breaches"]] == ["fixed"]
    assert door("diff", "good.json", "none.json").returncode == 4
    assert door("diff", "good.py", "good.json").returncode == 4


@pytest.mark.parametrize("form", ["junit", "sarif", "markdown", "html"])
def test_every_format_tells_of_the_gate(door: Door, form: str) -> None:
    door("gate", "rude.py:prepare", "--ledger", "l.toml", "--accept", *HERE)
    ran = door("gate", "nothing.py:prepare", "--ledger", "l.toml", *HERE, "--format", form)
    assert ran.returncode == 1, ran.stderr
    assert "KB103" in ran.stdout
    assert ("regressed" in ran.stdout) == (form != "sarif")
