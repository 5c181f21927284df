"""The configuration: where it is read, what it holds, what takes its place, and fifteen files that are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import kbitcheck
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS, EXIT_ERROR, EXIT_NOTHING, worst
from kbitcheck.run.configuration import KEYS, read, schema
from tests.cli.conftest import Door

SCHEMAS = Path(kbitcheck.__file__).parent / "report" / "schemas"

ALL = """
implementation = "good.py:prepare"
models = ["tiny:llama"]
quants = ["nf4"]
checkpointing = ["off"]
profile = "qlora"
select = ["KB1"]
ignore = {KB102 = "says nothing here"}
strict = true
ledger = "ledger.toml"
timeout = 20
jobs = 1
adapters = "reference"
"""

WRONG = [
    ("kbitcheck.toml", b'strict = "yes"', 'kbitcheck.toml: strict is true or false, not "yes"'),
    ("kbitcheck.toml", b'models = "tiny:llama"', 'models is a list, not "tiny:llama": ["tiny:llama"]'),
    ("kbitcheck.toml", b"quants = [4]", "quants wants a text, not 4"),
    ("kbitcheck.toml", b"timeout = 0", "timeout wants a number of seconds above 0, not 0"),
    ("kbitcheck.toml", b"timeout = nan", "timeout wants a number of seconds above 0, not nan"),
    ("kbitcheck.toml", b"jobs = true", "jobs wants a whole number of at least 0, not true"),
    ("kbitcheck.toml", b'model = ["tiny:llama"]', "no such key: model (did you mean models?)"),
    ("kbitcheck.toml", b'profile = "qlorra"', 'no such profile: "qlorra" (did you mean qlora?)'),
    ("kbitcheck.toml", b'checkpointing = ["on"]', 'no such checkpointing: "on"'),
    ("kbitcheck.toml", b'quants = ["nf5"]', "unknown quantization 'nf5'"),
    ("kbitcheck.toml", b'select = ["KB999"]', "kbitcheck.toml: no rule matches 'KB999'"),
    ("kbitcheck.toml", b'ignore = {KB101 = " "}', "ignore wants a reason for KB101"),
    ("kbitcheck.toml", b'ignore = ["KB101"]', "ignore is a table of codes to reasons, not a list"),
    ("kbitcheck.toml", b"models = [", "kbitcheck.toml is not TOML: "),
    ("kbitcheck.toml", b'ledger = "\xe9"', "cannot read kbitcheck.toml: byte 10 is not UTF-8"),
    ("kbitcheck.toml", b"\xef\xbb\xbfjobs = 1", "kbitcheck.toml begins with a byte order mark"),
    ("kbitcheck.toml", b"[tool.kbitcheck]\njobs = 1", "no such key: tool: here keys stand without a table"),
    ("kbitcheck.toml", b"[kbitcheck]\njobs = 1", "no such key: kbitcheck: here keys stand without a table"),
    ("kbitcheck.toml", None, "cannot read kbitcheck.toml: Is a directory"),
    ("pyproject.toml", b"[tool]\nkbitcheck = 1", "pyproject.toml [tool.kbitcheck] is no table, but 1"),
    ("pyproject.toml", b'[tool.kbitcheck]\nadapters = "lora"', "no such --adapters: 'lora' (did you mean peft:LoRA?)"),
]


@pytest.mark.parametrize(("name", "content", "line"), WRONG, ids=[line for _, _, line in WRONG])
def test_a_wrong_file_is_one_line(door: Door, name: str, content: bytes | None, line: str) -> None:
    path = door.cwd / name
    path.mkdir() if content is None else path.write_bytes(content)
    for command in (["impl", "good.py:prepare"], ["config"]):
        ran = door(*command)
        assert (ran.returncode, ran.stderr.count("\n"), ran.stdout) == (4, 1, "")
        assert line in ran.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "kbitcheck.toml")
    with pytest.raises(UsageError, match=r"kbitcheck\.toml: it is no file"):
        read(tmp_path)


def test_a_project_whose_tool_is_no_table_has_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('tool = "kbitcheck"')
    assert not read(tmp_path)


def test_each_key_holds_where_the_command_line_has_nothing(door: Door) -> None:
    (door.cwd / "kbitcheck.toml").write_text(ALL.replace("ledger =", "#"))
    ran = door("impl", "--format", "json")
    assert ran.returncode == EXIT_CONFORMS, ran.stderr
    report = json.loads(ran.stdout)
    [(case, spec)] = report["subject"]["cases"].items()
    assert (case, spec["profile"], spec["implementation"]) == ("tiny:llama-nf4-off", "qlora", "good.py:prepare")
    assert report["strict"]
    assert [r["rule"] for r in report["results"]] == ["KB101", "KB103"]
    assert report["subject"]["ignored"] == {"KB102": "says nothing here"}
    assert sorted(report["subject"]["configured"]) == sorted({*KEYS} - {"ledger"})


def test_what_is_typed_takes_the_place_of_the_file(door: Door) -> None:
    (door.cwd / "kbitcheck.toml").write_text(ALL.replace("ledger =", "#"))
    typed = ("--model", "tiny:gpt2", "--quant", "int8", "--checkpointing", "reentrant", "--profile", "peft")
    ran = door(
        "impl", "rude.py:prepare", *typed, "--select", "KB2", "--ignore", "KB9=no", "--no-strict", "--format", "json"
    )
    report = json.loads(ran.stdout)
    assert [*report["subject"]["cases"]] == ["tiny:gpt2-int8-reentrant"]
    assert report["subject"]["cases"]["tiny:gpt2-int8-reentrant"]["profile"] == "peft"
    assert (report["strict"], report["subject"]["ignored"]) == (False, {"KB9": "no"})
    assert [(r["rule"], r["status"]) for r in report["results"]] == [("KB201", "FAIL")]
    text = door("impl", "rude.py:prepare", *typed, "--select", "KB2").stdout
    assert "--profile peft" in text  # the command that shows it again is not the file's


def test_a_suite_that_is_typed_is_not_narrowed(door: Door) -> None:
    (door.cwd / "kbitcheck.toml").write_text(ALL.replace("ledger =", "#"))
    ran = door("impl", "--suite", "quick", "--format", "json")
    assert len(json.loads(ran.stdout)["subject"]["cases"]) == 9


def test_the_gate_takes_the_ledger_of_this_implementation_alone(door: Door) -> None:
    (door.cwd / "kbitcheck.toml").write_text(ALL)
    assert "ledger.toml is written" in door("gate", "--accept").stderr
    assert door("gate").returncode == EXIT_CONFORMS
    other = door("gate", "rude.py:prepare")
    assert (other.returncode, "--ledger FILE" in other.stderr) == (4, True)
    assert door("gate", "--against", "reference").returncode in (EXIT_CONFORMS, EXIT_BROKEN_RULE)


@pytest.mark.parametrize(
    ("command", "what"), [("impl", "implementation"), ("gate", "implementation"), ("model", "model")]
)
def test_without_an_argument_and_a_file_one_line_says_what_to_write(door: Door, command: str, what: str) -> None:
    ran = door(command)
    assert (ran.returncode, ran.stderr.count("\n")) == (4, 1)
    assert f"which {what}? write kbitcheck {command} " in ran.stderr


def test_a_model_audits_each_of_the_models(door: Door) -> None:
    (door.cwd / "kbitcheck.toml").write_text(ALL.replace('["tiny:llama"]', '["tiny:llama", "tiny:gpt2"]'))
    ran = door("model", "--format", "json")
    assert ran.returncode == EXIT_CONFORMS, ran.stderr
    specs = json.loads(ran.stdout)["subject"]["cases"]
    assert [*specs] == ["tiny:llama-nf4-off", "tiny:gpt2-nf4-off"]
    assert {spec["implementation"] for spec in specs.values()} == {"good.py:prepare"}


def test_the_worst_code_of_several_runs() -> None:
    assert worst([EXIT_CONFORMS, EXIT_NOTHING]) == EXIT_NOTHING
    assert worst([EXIT_ERROR, EXIT_NOTHING, EXIT_BROKEN_RULE, EXIT_CONFORMS]) == EXIT_BROKEN_RULE
    assert worst([EXIT_CONFORMS]) == EXIT_CONFORMS


def test_the_nearest_folder_decides_and_its_own_file_comes_before_the_shared_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project" / "src"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert dict(read()) == {}
    (tmp_path / "kbitcheck.toml").write_text("jobs = 9\nstrict = true")
    (tmp_path / "project" / "pyproject.toml").write_text("[project]\nname = 'kbitcheck-user'")
    assert dict(read()) == {"strict": True, "jobs": 9}
    (tmp_path / "project" / "pyproject.toml").write_text('[tool.kbitcheck]\ntimeout = 5\njobs = 2\nledger = "l.toml"')
    (tmp_path / "project" / "kbitcheck.toml").write_text(
        'jobs = 3\nimplementation = "p.py:prepare"\nmodels = ["m", "o/n"]'
    )
    (tmp_path / "project" / "m").mkdir()
    configuration = read()
    assert dict(configuration) == {
        "implementation": "../p.py:prepare",
        "models": ["../m", "o/n"],
        "ledger": "../l.toml",
        "timeout": 5,
        "jobs": 3,
    }
    assert configuration.settings["jobs"].origin == "../kbitcheck.toml"
    assert configuration.settings["timeout"].origin == "../pyproject.toml [tool.kbitcheck]"


def test_a_broken_file_that_is_not_ours_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project")
    assert dict(read()) == {}
    (tmp_path / "pyproject.toml").write_text("[tool.kbitcheck")
    with pytest.raises(UsageError, match="not TOML"):
        read()


def test_config_says_what_holds_and_where_it_comes_from(door: Door) -> None:
    assert "kbitcheck init" in door("config").stdout
    (door.cwd / "pyproject.toml").write_text('[tool.kbitcheck]\nquants = ["nf4", "int8"]\nignore = {KB101 = "why"}')
    lines = door("config").stdout.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] == [*KEYS]
    assert "nf4, int8" in lines[2]
    assert lines[2].endswith("pyproject.toml [tool.kbitcheck]")
    assert lines[0].endswith("not set")
    assert json.loads(door("config", "--format", "json").stdout)["ignore"] == {
        "value": {"KB101": "why"},
        "from": "pyproject.toml [tool.kbitcheck]",
    }
    assert (door("config", "quants").stdout, door("config", "ledger").stdout) == ("nf4, int8\n", "\n")
    wrong = door("config", "quant")
    assert (wrong.returncode, "did you mean quants?" in wrong.stderr) == (4, True)


def test_the_published_schema_is_what_is_checked(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = json.loads((SCHEMAS / "configuration.schema.json").read_text())
    assert published == schema() == json.loads(door("config", "--schema").stdout)
    assert {*published["properties"]} == {*KEYS}
    validator = jsonschema.Draft202012Validator(published)
    monkeypatch.chdir(tmp_path)
    wrong: list[tuple[str, Any]] = [
        ("implementation", ""),
        ("models", "x"),
        ("timeout", -1),
        ("jobs", 1.5),
        ("strict", 1),
    ]
    wrong += [("profile", "no"), ("checkpointing", ["no"]), ("ignore", {"KB1": ""}), ("nothing", 1), ("timeout", True)]
    right: list[tuple[str, Any]] = [("timeout", 1.5), ("jobs", 0), ("ignore", {"KB1": "x"}), ("strict", False)]
    for (key, value), holds in [*((pair, False) for pair in wrong), *((pair, True) for pair in right)]:
        text = (
            json.dumps(value)
            if not isinstance(value, dict)
            else "".join(f"{{{k} = {json.dumps(v)}}}" for k, v in value.items())
        )
        (tmp_path / "kbitcheck.toml").write_text(f"{key} = {text}")
        assert validator.is_valid({key: value}) == holds, key
        if holds:
            assert read()[key] == value
        else:
            with pytest.raises(UsageError):
                read()
