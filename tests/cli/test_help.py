"""Help fits a screen and has examples that run; output heeds --quiet, --color and what the environment says of colours."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from kbitcheck.cli.app import COMMANDS
from kbitcheck.cli.help import EXAMPLES, FEW, GROUPS, USED_FIRST
from tests.cli.conftest import Door

COLUMNS, LINES = 100, 45


def wide(door: Door, *arguments: str) -> str:
    environment = {**door.environment(), "COLUMNS": str(COLUMNS)}
    ran = door.stubbed.run("kbitcheck", *arguments, cwd=door.cwd, environment=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(door: Door, command: str) -> None:
    lines = wide(door, *filter(None, [command]), "--help").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    if command:
        assert [f"  {line}" for line in EXAMPLES[command]] == [
            line for line in lines if line.startswith("  kbitcheck ")
        ]


@pytest.mark.parametrize("command", COMMANDS)
def test_all_help_has_every_option_in_a_group(door: Door, command: str) -> None:
    kind = import_module(f"kbitcheck.cli.commands.{command}").Options
    names = {f"--{each.name.replace('_', '-')}" for each in fields(kind) if "nargs" not in each.metadata}
    text = wide(door, command, "--help-all")
    assert names <= {*re.findall(r"(--[a-z-]+)", text)}
    short = wide(door, command, "--help")
    hidden = [name for name in names if not re.search(rf"^ +(-. ?[A-Z]*, )?{name}\b", short, re.MULTILINE)]
    assert (f"lists {len(hidden)} more options" in short) == bool(hidden)
    assert not hidden or len(names) > FEW


def test_groups_name_options_that_exist() -> None:
    options = {
        each.name for command in COMMANDS for each in fields(import_module(f"kbitcheck.cli.commands.{command}").Options)
    }
    assert {name for groups in GROUPS.values() for part in groups for name in part} <= options
    for command, names in USED_FIRST.items():
        kind = import_module(f"kbitcheck.cli.commands.{command}").Options
        assert {*names} <= {each.name for each in fields(kind)}
    assert [*EXAMPLES] == [*EXAMPLES.keys() & COMMANDS.keys()] or {*EXAMPLES} == {*COMMANDS}


# What reads saved adapters, trains or lists what transformers has takes a real stack, and has tests of its own.
NOT_ON_STUBS = ("watch", "adapter", "backends", "selftest", "sweep")
RUNS = [(command, line) for command, lines in EXAMPLES.items() if command not in NOT_ON_STUBS for line in lines]


@pytest.mark.parametrize(("command", "line"), RUNS, ids=[line for _, line in RUNS])
def test_examples_run(door: Door, command: str, line: str) -> None:
    folder = door.cwd / "mypkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "prepare.py").write_text(
        "def prepare(model, use_gradient_checkpointing=True):\n    return model\nprepare.please = True\n"
    )
    if command in ("diff", "show", "badge"):
        saved = (
            "impl",
            "mypkg.prepare:prepare",
            "--model",
            "tiny:llama",
            "--quant",
            "nf4",
            "--format",
            "json",
            "--output",
        )
        for name in ("report.json", "before.json", "after.json"):
            assert door(*saved, name).returncode == 0
    if "--ledger" in line and "--accept" not in line:
        assert "is written" in door(*shlex.split(line)[1:], "--accept").stderr
    words = shlex.split(line.partition(" > ")[0])
    if "KB505" in line or "KB3" in line:  # rules that the stubs do not have
        words = [word.replace("KB505", "KB102").replace("KB3", "KB1") for word in words]
    if "--static" in words:  # whose facts are no stub's: it runs below
        words += ["--help"]
    if command == "model" and "--prepare" not in words:  # the stubs have no peft
        words += ["--prepare", "reference"]
    ran = door(*words[1:])
    assert ran.returncode in (0, 1), ran.stderr  # 1 is the verdict on a stub
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_the_example_of_a_forecast_runs(tmp_path: Path) -> None:
    [line] = [line for line in EXAMPLES["model"] if "--static" in line]
    ran = subprocess.run([sys.executable, "-m", *shlex.split(line)], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "fits" in ran.stdout


def test_examples_of_the_commands_that_are_not_run_are_parsed(door: Door) -> None:
    for command in NOT_ON_STUBS:
        for line in EXAMPLES[command]:
            words = shlex.split(line)
            before_dashes = words[1 : words.index("--") if "--" in words else None]
            assert door(*before_dashes, "--help").returncode == 0


ONE = ("--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off")


def test_quiet_is_one_line(door: Door) -> None:
    ran = door("impl", "rude.py:prepare", *ONE, "--quiet")
    assert (ran.stdout.count("\n"), ran.stderr) == (1, "")
    assert ran.stdout.startswith("✓ conforms")
    ran = door("impl", "rude.py:prepare", *ONE, "-q", "--format", "json", "--output", "report.json")
    assert (ran.stdout.count("\n"), ran.stderr) == (1, "")
    assert json.loads((door.cwd / "report.json").read_text())["results"]
    assert door("show", "report.json", "-q").stdout == ran.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("matrix", "good.py:prepare", "nothing.py:prepare", *ONE),
            "1 of 2 implementations break a MUST (nothing.py:prepare), 0 not wholly judged",
        ),
        (
            ("sweep", "--prepare", "good.py:prepare", "--select", "llama", "--select", "late"),
            "1 of 2 causal-lm architectures audited, 0 with a broken MUST of the implementation, 1 not wholly judged",
        ),
        (("selftest", "--select", "KB1"), "2 of 2 faults caught"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_a_quiet_table_is_the_line_that_sums_it_up(door: Door, arguments: tuple[str, ...], line: str) -> None:
    ran = door(*arguments, "--quiet")
    assert (ran.stdout, ran.stderr) == (f"{line}\n", "")
    if arguments[0] == "selftest":  # which has no table
        return
    aside = door(*arguments, "-q", "--format", "json", "--output", "table.json")
    assert (aside.stdout, aside.stderr) == (f"{line}\n", "")
    assert json.loads((door.cwd / "table.json").read_text())["rows"]


COLOUR = "\x1b["


@pytest.mark.parametrize(
    ("arguments", "variables", "colours"),
    [
        ((), {}, False),
        (("--color", "always"), {}, True),
        (("--color", "always"), {"NO_COLOR": "1"}, True),
        ((), {"FORCE_COLOR": "1"}, True),
        ((), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (("--color", "never"), {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colours(door: Door, arguments: tuple[str, ...], variables: dict[str, str], colours: bool) -> None:
    environment = {k: v for k, v in door.environment().items() if k not in ("NO_COLOR", "FORCE_COLOR")} | variables
    ran = door.stubbed.run(
        "kbitcheck", "impl", "rude.py:prepare", *ONE, *arguments, cwd=door.cwd, environment=environment
    )
    assert (COLOUR in ran.stdout) == colours
    assert COLOUR not in ran.stderr


def on_a_terminal(folder: Path, *arguments: str, **variables: str) -> str:
    """What a command writes to a terminal."""
    leader, follower = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "kbitcheck", *arguments]
    ran = subprocess.Popen(
        command, stdin=follower, stdout=follower, cwd=folder, env={**environment, "TERM": "xterm", **variables}
    )
    os.close(follower)
    text = b""
    try:
        while part := os.read(leader, 65536):
            text += part
    except OSError:  # the terminal is closed
        pass
    assert ran.wait() == 0
    os.close(leader)
    return text.decode()


def test_a_terminal_has_colours_unless_the_environment_says_no(tmp_path: Path) -> None:
    report = {"schema": 1, "tool": "kbitcheck", "environment": {}, "subject": {}, "blame": "own", "strict": False}
    result = {"rule": "KB101", "case": "x", "level": "MUST", "status": "PASS", "examined": 1}
    (tmp_path / "r.json").write_text(json.dumps({**report, "complete": True, "facts": {}, "results": [result]}))
    assert COLOUR in on_a_terminal(tmp_path, "show", "r.json")
    assert COLOUR not in on_a_terminal(tmp_path, "show", "r.json", NO_COLOR="1")
    assert COLOUR not in on_a_terminal(tmp_path, "show", "r.json", "--color", "never")


def test_a_rules_page_is_paged_on_a_terminal_alone(tmp_path: Path) -> None:
    (tmp_path / "pager").write_text("#!/bin/sh\necho PAGED\ncat\n")
    (tmp_path / "pager").chmod(0o755)
    pager = str(tmp_path / "pager")
    assert "PAGED" in on_a_terminal(tmp_path, "rules", "KB101", PAGER=pager)
    assert "PAGED" not in on_a_terminal(tmp_path, "rules", "KB101", "--no-pager", PAGER=pager)
    assert "PAGED" not in on_a_terminal(tmp_path, "rules", "KB1", PAGER=pager)


NEAREST = [
    (("modle", "tiny:llama"), "did you mean model?"),
    (("tiny:llama",), "did you mean kbitcheck model tiny:llama?"),
    (("mypkg:prepare",), "did you mean kbitcheck impl mypkg:prepare?"),
    (("impl", "refrence"), "reference"),
    (("impl", "reference", "--modle", "tiny:llama"), "did you mean --model?"),
    (("impl", "reference", "--quant", "nf44"), "did you mean nf4?"),
    (("impl", "reference", "--profile", "qlorra"), "did you mean qlora?"),
    (("impl", "reference", "--checkpointing", "non-reentrent"), "did you mean non-reentrant?"),
    (("impl", "reference", "--device", "cdua"), "did you mean cuda?"),
    (("impl", "reference", "--select", "KB1O1"), "did you mean KB101?"),
    (("impl", "good.py:perpare"), "did you mean prepare?"),
    (("rules", "KB999"), "did you mean KB901?"),
    (("config", "ledgr"), "did you mean ledger?"),
    (("completion", "bsh"), "did you mean bash?"),
    (("show", "reprot.json"), "did you mean report.json?"),
    (("show", "report.json", "--format", "htlm"), "did you mean html?"),
    (("--hepl",), "did you mean --help?"),
]


@pytest.mark.parametrize(("arguments", "nearest"), NEAREST, ids=[" ".join(a) for a, _ in NEAREST])
def test_wrong_usage_names_the_nearest_right_one(door: Door, arguments: tuple[str, ...], nearest: str) -> None:
    (door.cwd / "report.json").write_text("{}")
    ran = door(*arguments)
    assert (ran.returncode, ran.stderr.count("\n"), ran.stdout) == (4, 1, "")
    assert nearest in ran.stderr


def test_a_misspelt_recipe_names_the_nearest() -> None:
    """Not on the stubs, which have no recipes."""
    command = [sys.executable, "-m", "kbitcheck", "impl", "reference", "--model", "tiny:lama"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, "did you mean tiny:llama?" in ran.stderr) == (4, True)


def test_env_says_what_a_report_of_a_defect_needs(door: Door) -> None:
    values = json.loads(door("env", "--format", "json").stdout)
    assert {
        "kbitcheck",
        "python",
        "platform",
        "packages",
        "processor",
        "processor_features",
        "devices",
        "quantizers",
    } <= {*values}
    assert values["packages"]["torch"]
    text = door("env").stdout
    assert values["packages"]["torch"] in text
    assert all(line.split()[0] for line in text.splitlines())
