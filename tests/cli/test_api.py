"""The two functions of the public API, called in a process of their own on the stubs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.cli.conftest import Door

ONE = "models=['tiny:llama'], quants=['nf4'], checkpointing=['off']"

MODEL = """
from types import SimpleNamespace
class Model:
    def parameters(self):
        yield SimpleNamespace(device="cpu")
"""


def called(door: Door, expression: str) -> dict[str, Any]:
    script = f"import json, kbitcheck\n{MODEL}\nprint(json.dumps(({expression}).as_json()))"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=door.cwd,
        env=door.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize(
    ("prepare", "in_process", "code"),
    [
        ("'nothing.py:prepare'", False, 1),
        ("'good.py:prepare'", False, 0),
        ("lambda model: model", True, 0),
        ("id", True, 0),
    ],
)
def test_checking_an_implementation(door: Door, prepare: str, in_process: bool, code: int) -> None:
    report = called(door, f"kbitcheck.check_implementation({prepare}, {ONE})")
    assert (report["subject"]["in_process"], report["exit_code"]) == (in_process, code)
    assert [r["case"] for r in report["results"]] == ["tiny:llama-nf4-off"] * 5
    assert door.left() == []


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("kbitcheck.audit('a name')", "not a model: 'a name'"),
        (
            "kbitcheck.check_implementation('good.py:prepare', models='tiny:llama')",
            "models is a list, of one: ['tiny:llama']",
        ),
    ],
)
def test_what_is_no_model_and_no_list_is_wrong_usage(door: Door, expression: str, told: str) -> None:
    with pytest.raises(AssertionError, match=f"UsageError: {re.escape(told)}"):
        called(door, expression)


@pytest.mark.parametrize("prepare", ["'rude.py:prepare'", "lambda model: model"])
def test_auditing_a_live_model_counts_whoever_is_at_fault(door: Door, prepare: str) -> None:
    report = called(door, f"kbitcheck.audit(Model(), prepare={prepare}, ignore={{'KB102': 'why'}}, rank=8)")
    assert (report["blame"], report["exit_code"]) == ("any", 1)
    assert [r["rule"] for r in report["results"]] == ["KB101", "KB103", "KB201", "KB901"]
    assert next(iter(report["subject"]["cases"].values()))["rank"] == 8
    assert report["facts"]["cases"]["Model-int8-default"]["model_class"] == "Stub"


def test_wrong_arguments_are_usage_errors(door: Door) -> None:
    script = (
        "import kbitcheck\n"
        "try: kbitcheck.check_implementation('absent.py:f')\n"
        "except kbitcheck.UsageError as error: print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=door.cwd, env=door.environment(), capture_output=True, text=True, check=True
    )
    assert "no such file: absent.py" in ran.stdout
