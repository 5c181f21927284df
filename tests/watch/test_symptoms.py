"""The page of symptoms sends nobody to a door that does not judge the rule, and its commands are right."""

from pathlib import Path

import pytest
import torch

import kbitcheck
from kbitcheck.backends.quantization import Quantization
from kbitcheck.cli import app
from kbitcheck.cli.saved_report import read_report
from kbitcheck.core.result import Status
from tests.shallow import shallow
from tests.watch import runs

PAGE = Path(__file__).parents[2] / "docs" / "symptoms.md"


def rows():
    """The command and the codes of each row."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and "KB" in line:
            *_, command, codes = line.strip("|").split("|")
            yield command.strip().strip("`"), codes.strip().split(", ")


ROWS = list(rows())
ONE_CASE = ("--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "reentrant")


def judged(report):
    return {result.rule for result in report if result.status is not Status.SKIP}


def watched(run):
    model, optimizer, loop = run()
    with kbitcheck.watch(model, optimizer, steps=3) as watched:
        loop.pop("first", lambda: None)()
        runs.loop(model, optimizer, **loop)
    return judged(watched.report)


def scaled():
    model, optimizer, loop = runs.reentrant()
    return model, optimizer, {**loop, "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)}


def judged_by(door, folder):
    """The codes of the rules that a door judges."""
    if door == "watch":
        shown = (runs.reentrant, runs.accumulated, runs.rounded_away, runs.checkpointing_switched_on_again, scaled)
        return set().union(*map(watched, shown))
    if door == "assert_prepared":
        return judged(kbitcheck.assert_prepared(runs.prepared()))
    options = {
        "static": ["model", "tiny:llama", "--static", "--memory", "24GiB"],
        "model": ["model", "tiny:llama", "--quant", "nf4,skip=lm_head", "--checkpointing", "reentrant"],
        "impl": ["impl", "reference", *ONE_CASE],
        "composition": ["impl", "reference", *ONE_CASE, "--composition", "compile"],
    }
    codes = set()
    for arguments in (options[door], *packed(door, folder)):
        saved = folder / f"{door}.json"
        assert app.run([*arguments, "--format", "json", "--output", str(saved)]) == 0
        codes |= judged(read_report(saved))
    return codes


def packed(door, folder):
    """A static audit of a checkpoint that is quantized already."""
    if door == "static":
        shallow("tiny:gpt2").load(Quantization.parse("nf4")).save_pretrained(folder / "packed")
        yield ["model", str(folder / "packed"), "--static", "--memory", "24GiB"]


def door_of(command):
    if "assert_prepared" in command:
        return "assert_prepared"
    options = [option for option in ("static", "composition") if f"--{option}" in command]
    return options[0] if options else command.split()[1]


SLOW = [pytest.param(door, marks=pytest.mark.slow) for door in ("model", "impl", "composition")]


@pytest.mark.parametrize("door", ["watch", "assert_prepared", "static", *SLOW])
def test_a_row_names_what_its_command_judges(door, tmp_path, forked_workers):
    sent = {code for command, codes in ROWS if door_of(command) == door for code in codes}
    assert sent
    assert sent <= judged_by(door, tmp_path)
