"""``--prepare`` with the name of a trainer: what is installed for it, what it promises, what a forecast of it adds."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import kbitcheck
from kbitcheck.cli.main import run as command_line
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.profile import OF_TRAINERS, kept_by
from kbitcheck.run import suites, virtualenvs
from kbitcheck.run.requirements import TRAINERS, Requirement, parse
from kbitcheck.run.subject import default_profile, validate
from tests.scripts import benchmark


def test_every_trainer_has_a_requirement_a_profile_and_a_module() -> None:
    assert set(TRAINERS) == set(OF_TRAINERS)
    for name, requirement in TRAINERS.items():
        validate(name)
        assert parse(name) is requirement
        module = requirement.function.partition(":")[0]
        assert importlib.util.find_spec(module) is not None
        assert re.search(r"==\d", requirement.text)
        assert default_profile(name) == "auto"


def test_a_release_means_what_the_trainer_means() -> None:
    for name, requirement in TRAINERS.items():
        assert parse(requirement.text) is requirement, name
    older = parse("trl==1.15.0")
    assert older is not None
    assert (older.text, older.function) == ("trl==1.15.0", TRAINERS["trl"].function)
    with pytest.raises(kbitcheck.UsageError, match="names no function"):  # what is beside 0.9.5 fits no other
        parse("llamafactory==0.9.4")


@pytest.mark.parametrize(
    ("name", "profile", "freezes"),
    [
        ("trl", "frozen-half", "at-prepare"),
        ("trl==1.16.0", "frozen-half", "at-prepare"),
        ("trl==1.16.0::a:b", "peft", "at-prepare"),
        ("llamafactory", "frozen-half", "at-attach"),
        ("swift", "frozen-half", "at-attach"),
        ("peft", "peft", "at-prepare"),
        ("mine:f", "peft", "at-prepare"),
    ],
)
def test_cases_keep_what_the_implementation_is_known_to_keep(name: str, profile: str, freezes: str) -> None:
    assert (kept_by(name).profile, kept_by(name).freezes) == (profile, freezes)
    (spec,) = suites.cases((), models=["tiny:gpt2"], quants=["nf4"], checkpointing=["off"], implementation=name)
    assert (spec.profile, spec.freezes) == (profile, freezes)
    cells = suites.cases(suites.QUICK, implementation=name, profile="qlora", freezes="at-prepare")
    assert {(spec.profile, spec.freezes) for spec in cells} == {("qlora", "at-prepare")}


def test_every_command_that_names_a_trainer_judges_by_what_it_keeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Which dtypes it promises, and when it freezes."""
    specs: list[CaseSpec] = []

    def run(cases: Sequence[CaseSpec], *args: Any, **options: Any) -> Any:
        specs.extend(cases)
        raise kbitcheck.UsageError("enough")

    monkeypatch.setattr("kbitcheck.cli.cases.run", run)
    monkeypatch.setattr("kbitcheck.cli.cases.install", lambda *args, **options: None)
    for command in (["impl"], ["matrix"], ["gate", "--ledger", "none.toml", "--accept"]):
        specs.clear()
        command_line(
            [*command, "llamafactory", "--model", "tiny:gpt2", "--quant", "nf4", "--output", str(tmp_path / "report")]
        )
        assert {(spec.profile, spec.freezes) for spec in specs} == {("frozen-half", "at-attach")}, command
    capsys.readouterr()


def test_a_forecast_of_a_trainer_upcasts_what_the_trainer_does() -> None:
    upcast = {name: _forecast(name)["upcast"] for name in ("swift", "peft")}
    assert upcast["swift"] == 0 < upcast["peft"]


def _forecast(name: str) -> Any:
    from kbitcheck.core.rule import select
    from kbitcheck.observe.open_case import open_case
    from kbitcheck.run.subject import unused

    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation=name, profile="auto", static="always")
    return open_case(spec, unused(name), rules=select(["KB901"], {})).summary()["forecast"]


@pytest.mark.parametrize("uv", [None, "/bin/uv"])
def test_a_trainer_is_installed_with_what_is_named_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uv: str | None
) -> None:
    ran: list[list[str]] = []

    def run(words: Sequence[str]) -> tuple[int, str]:
        ran.append([*words])
        return 0, ""

    monkeypatch.setattr(virtualenvs, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda name: uv)
    (tmp_path / "bin").mkdir()
    virtualenvs._install(Requirement("a==1", "a:f", beside=("b==2",)), tmp_path, [])
    (words,) = ran
    assert {"--no-deps", "a==1", "b==2"} <= set(words)


def test_an_unknown_trainer_is_wrong_usage() -> None:
    with pytest.raises(kbitcheck.UsageError, match="trl, llamafactory"):
        validate("lamafactory")


def test_the_page_is_what_the_committed_rows_give() -> None:
    trainers = benchmark("trainers")
    rows = json.loads(trainers.ROWS.read_text(encoding="utf-8"))
    assert trainers.PAGE.read_text(encoding="utf-8") == trainers.page(rows)
    assert {*OF_TRAINERS} <= set(rows)


def test_rows_of_the_page_differ_where_trainers_do() -> None:
    trainers = benchmark("trainers")
    rows = json.loads(trainers.ROWS.read_text(encoding="utf-8"))
    table = trainers.page(rows).partition("## What broke")[0].splitlines()
    rest = {
        title: [line.partition("|")[2] for line in table if line.startswith(f"| {title} ")]
        for title in ("TRL", "LLaMA-Factory")
    }
    assert len(rest["TRL"]) == len(rest["LLaMA-Factory"]) == 2
    assert all(a.split("|")[1:] != b.split("|")[1:] for a, b in zip(*rest.values(), strict=True))
    changed = {**rows, "trl": {**rows["trl"], "recipe": "another"}}
    assert trainers.page(changed) != trainers.page(rows)
