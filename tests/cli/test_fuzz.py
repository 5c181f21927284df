"""``impl --fuzz``: drawn cases in a worker, and the smallest that fails as a recipe and a command."""

import json
import os
import shlex
import subprocess
import sys
import time
import tomllib

import pytest
from hypothesis import settings
from hypothesis.database import InMemoryExampleDatabase

from kbitcheck.core.events import Judged
from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS
from kbitcheck.core.result import Level, Observation, Result, Status
from kbitcheck.core.rule import select
from kbitcheck.run.fuzz import Plan, fuzz

NEVER_CASTS_WIDE_MODELS = """
from kbitcheck_reference import prepare_model_for_kbit_training

def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    if model.config.get_text_config().vocab_size > 60:
        next(p for p in model.parameters() if p.is_floating_point()).requires_grad_(True)
    return model
"""


# Under CI hypothesis keeps no database.
CI = ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "TF_BUILD", "BUILDKITE", "CIRCLECI", "CIRRUS_CI")


def kbitcheck(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "kbitcheck", *arguments],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name not in CI},
        capture_output=True,
        text=True,
        timeout=1500,  # of twelve cases on a slow machine
    )


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A report of a fault that only models of some size have, and where it was made."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "mine.py").write_text(NEVER_CASTS_WIDE_MODELS, encoding="utf-8")
    run = kbitcheck(
        "impl",
        "mine.py:prepare",
        "--fuzz",
        "30",
        "--seed",
        "0",
        "--select",
        "KB101,KB503",
        "--format",
        "json",
        cwd=folder,
    )
    assert run.returncode == EXIT_BROKEN_RULE, run.stderr
    return folder, json.loads(run.stdout)


@pytest.mark.slow
def test_the_smallest_failure_is_told_as_a_recipe(failing):
    _, report = failing
    recipe = tomllib.loads(report["subject"]["fuzz"]["recipe"])
    text = recipe["config"].get("text_config", recipe["config"])
    assert text["vocab_size"] == 61
    assert {r["rule"] for r in report["results"] if r["status"] == "FAIL"} == {"KB101"}
    assert len({r["case"] for r in report["results"]}) == 1


@pytest.mark.slow
def test_its_command_runs_it_again(failing):
    folder, report = failing
    found = report["subject"]["fuzz"]
    (folder / found["file"]).write_text(found["recipe"], encoding="utf-8")
    words = shlex.split(found["command"])
    assert words[0] == "kbitcheck"
    again = kbitcheck(*words[1:], cwd=folder)
    assert again.returncode == EXIT_BROKEN_RULE
    assert "KB101" in again.stdout


@pytest.mark.slow
def test_what_failed_is_kept_and_tried_first(failing):
    folder, report = failing
    assert (folder / ".hypothesis").is_dir()
    run = kbitcheck(
        "impl", "mine.py:prepare", "--fuzz", "1", "--seed", "9", "--select", "KB101", "--format", "json", cwd=folder
    )
    assert run.returncode == EXIT_BROKEN_RULE
    assert json.loads(run.stdout)["subject"]["fuzz"]["recipe"] == report["subject"]["fuzz"]["recipe"]


@pytest.mark.slow
def test_a_seed_draws_the_same_cases_and_what_is_named_is_kept(tmp_path):
    options = ("--fuzz", "3", "--select", "KB101", "--quant", "int8", "--checkpointing", "off", "--format", "json")
    runs = [kbitcheck("impl", "reference", *options, "--seed", seed, cwd=tmp_path) for seed in ("1", "1", "2")]
    assert [run.returncode for run in runs] == [EXIT_CONFORMS] * 3
    first, same, other = (json.loads(run.stdout)["subject"]["cases"] for run in runs)
    assert first == same != other
    assert {(c["quant"], c["checkpointing"]) for c in first.values()} == {("int8", "off")}
    assert json.loads(runs[0].stdout)["subject"]["fuzz"]["unloadable"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "peft"])
def test_nothing_healthy_is_flagged(implementation, tmp_path):
    quants = []
    if implementation == "peft":
        pytest.importorskip("peft")
        # Of other methods its function leaves checkpointing off.
        quants = ["--quant", "nf4", "--quant", "fp4,double", "--quant", "int8"]
    run = kbitcheck("impl", implementation, "--fuzz", "12", "--seed", "3", *quants, cwd=tmp_path)
    assert run.returncode == EXIT_CONFORMS, run.stdout
    assert "12 cases drawn, seed 3" in run.stdout


def test_what_it_keeps_is_hidden_from_git(door, monkeypatch):
    for name in CI:
        monkeypatch.delenv(name, raising=False)
    assert door("impl", "nothing.py:prepare", "--fuzz", "1", "--seed", "0", "--select", "KB103").returncode == 1
    kept = door.cwd / ".hypothesis"
    assert (kept / "examples").is_dir()
    assert "*" in (kept / ".gitignore").read_text().splitlines()


class Refutes:
    """A worker to which every case is broken."""

    loaded = True

    def __init__(self, *arguments, **options):
        pass

    def examine(self, spec, rules):
        failure = Observation("here", "one", "other", ok=False)
        for rule in rules:
            yield Judged(
                result=Result(rule=rule.code, case=spec.id, level=Level.MUST, status=Status.FAIL, failures=(failure,))
            )

    def close(self):
        pass


@pytest.fixture
def database():
    """The one that hypothesis keeps examples in."""
    memory = InMemoryExampleDatabase()
    settings.register_profile("memory", database=memory)
    settings.load_profile("memory")
    yield memory
    settings.load_profile("kbitcheck")


def test_implementations_share_no_examples_in_any_database(database, monkeypatch):
    monkeypatch.setattr("kbitcheck.run.fuzz.Worker", Refutes)
    keys = []
    for implementation in ("one.py:f", "other.py:f"):
        plan = Plan(
            implementation=implementation,
            rules=select(["KB103"]),
            number=1,
            seconds=60.0,
            seed=0,
            strict=False,
            models=["tiny:llama"],
            quants=["nf4"],
            checkpointing=["off"],
            options={},
        )
        assert fuzz(plan, timeout=1.0, on_event=print, echo=None).exit_code == EXIT_BROKEN_RULE
        keys.append(set(database.data))
        database.data.clear()
    assert all(keys)
    assert keys[0].isdisjoint(keys[1])


class Passes(Refutes):
    """A worker to which every case is healthy, and which takes time."""

    def examine(self, spec, rules):
        time.sleep(0.02)
        for rule in rules:
            yield Judged(result=Result(rule=rule.code, case=spec.id, level=Level.MUST, status=Status.PASS, examined=1))


def test_the_time_ends_the_run_and_a_failure_is_told_all_the_same(database, monkeypatch):
    plan = Plan(
        implementation="one.py:f", rules=select(["KB103"]), number=10**9, seconds=4.0, seed=0, strict=False, models=(),
        quants=(), checkpointing=(), options={},
    )  # fmt: skip
    monkeypatch.setattr("kbitcheck.run.fuzz.Worker", Passes)
    monkeypatch.setattr("kbitcheck.run.fuzz.REPORTED", 2)
    report = fuzz(plan, timeout=1.0, on_event=print, echo=None)
    assert (report.exit_code, report.complete, len(report.results)) == (EXIT_CONFORMS, True, 2)
    assert 2 < report.subject["fuzz"]["cases"] < 200
    monkeypatch.setattr("kbitcheck.run.fuzz.Worker", Refutes)
    report = fuzz(plan, timeout=1.0, on_event=print, echo=None)
    assert (report.exit_code, report.complete) == (EXIT_BROKEN_RULE, True)
    assert report.subject["fuzz"]["command"]


def test_hypothesis_is_not_imported_unless_something_is_drawn():
    code = "import sys, kbitcheck.cli.commands.impl; print([m for m in ('hypothesis', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_parent_of_a_fuzzing_run_imports_no_torch():
    code = "import sys, kbitcheck.run.fuzz; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_gate_compares_no_drawn_cases(tmp_path):
    run = kbitcheck("gate", "reference", "--ledger", "x.toml", "--fuzz", "3", cwd=tmp_path)
    assert run.returncode == 4
    assert "--fuzz and --hours belong to `kbitcheck impl`" in run.stderr
