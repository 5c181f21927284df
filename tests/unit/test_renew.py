"""What makes a row of the published results worse, and the commands that renew them."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.backends.quantization import Quantization
from kbitcheck.cli.options import Parser, add_options
from tests.scripts import benchmark

renew = benchmark("renew")
KEPT: dict[str, str] = {"KB101": "kept", "KB102": "skipped", "KB103": "broken SHOULD"}
MATRIX_ROW = {
    "subject": {"name": "PEFT 1", "implementation": "peft==1", "left_out": ""},
    "marks": KEPT,
    "broken": {"KB103": {"tiny:llama-nf4-off": "prepare: expected the model, found None"}},
    "versions": {},
    "error": "",
}
SWEEP_ROW = {
    "architecture": "llama", "cls": "LlamaForCausalLM", "model": "arch:llama", "loads": True, "prepares": True, "trains": True,
    "findings": [], "errors": [], "reason": "",
}  # fmt: skip
FINDING = {
    "rule": "KB303", "level": "MUST", "party": "stack", "where": "q_proj", "actual": "error 7 times its bound", "failures": 1
}  # fmt: skip


def table(folder: Path, name: str, *rows: Any) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"rows": rows}))
    return folder


def test_the_commands_are_those_of_the_command_line() -> None:
    for name, (command, *rest) in dict(renew.commands()).items():
        parser = Parser(prog=command)
        add_options(parser, import_module(f"kbitcheck.cli.commands.{command}").Options, command)
        options = vars(parser.parse_args(rest))
        assert options["output"].endswith(f"{name}.json")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"marks": {**KEPT, "KB103": "kept"}}, None),
        ({"marks": {**KEPT, "KB102": "kept"}}, None),
        (
            {"marks": {**KEPT, "KB103": "broken MUST"}},
            "* PEFT 1: KB103 was broken SHOULD, is broken MUST (prepare: expected the model, found None)",
        ),
        ({"marks": {**KEPT, "KB101": "skipped"}}, "* PEFT 1: KB101 was kept, is skipped"),
        ({"marks": {"KB102": "skipped", "KB103": "broken SHOULD"}}, "* PEFT 1: KB101 was kept, is skipped"),
        ({"error": "no such release", "marks": {}}, "* PEFT 1: no such release"),
        ({"subject": {"name": "PEFT 2"}}, "* PEFT 1: the row is gone"),
    ],
)
def test_a_release_is_worse(tmp_path: Path, change: Any, line: str | None) -> None:
    before = table(tmp_path / "before", "matrix.json", MATRIX_ROW)
    after = table(tmp_path / "after", "matrix.json", {**MATRIX_ROW, **change})
    assert list(renew.worse(before, after)) == ([line] if line else [])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"trains": False, "reason": "a step raises"}, "* causal-lm-nf4, llama: no longer trains (a step raises)"),
        (
            {"findings": [FINDING]},
            "* causal-lm-nf4, llama: KB303 is broken by the stack: q_proj: error 7 times its bound",
        ),
        ({"errors": ["KB210: lost"]}, "* causal-lm-nf4, llama: KB210: lost could not be judged"),
        ({"architecture": "llama4"}, "* causal-lm-nf4, llama: the row is gone"),
    ],
)
def test_an_architecture_is_worse(tmp_path: Path, change: Any, line: str | None) -> None:
    before = table(tmp_path / "before", "sweep/causal-lm-nf4.json", SWEEP_ROW)
    after = table(tmp_path / "after", "sweep/causal-lm-nf4.json", {**SWEEP_ROW, **change})
    assert list(renew.worse(before, after)) == ([line] if line else [])
    # What is mended is none.
    assert not list(renew.worse(table(after, "matrix.json"), table(before, "matrix.json"))) or line is not None


def test_a_table_that_is_gone_and_a_report_behind_a_row(tmp_path: Path) -> None:
    before = table(tmp_path / "before", "matrix.json", MATRIX_ROW)
    (tmp_path / "after").mkdir()
    (before / "reports").mkdir()
    (before / "reports" / "peft-1.json").write_text("{}")
    assert list(renew.worse(before, tmp_path / "after")) == ["* matrix.json: the table is gone"]


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(
        renew, "RESULTS", table(tmp_path / "after", "matrix.json", {**MATRIX_ROW, "error": "gone", "marks": {}})
    )
    same = table(tmp_path / "same", "matrix.json")
    assert renew.main(["--worse", str(same)]) == 0
    assert renew.main(["--worse", str(table(tmp_path / "before", "matrix.json", MATRIX_ROW))]) == 1
    assert capsys.readouterr().out == "No row got worse.\n* PEFT 1: gone\n"
    assert renew.main(["matrices"]) == 4
    assert renew.main(["--worse", str(tmp_path / "nowhere")]) == 4
    ended = iter([1, 3])
    monkeypatch.setattr(renew, "renew", lambda name, arguments: next(ended))
    assert renew.main(["matrix", "causal-lm-nf4"]) == 0
    monkeypatch.setattr(renew, "renew", lambda name, arguments: 2)
    assert renew.main(["matrix"]) == 2


def test_a_table_that_is_whole_starts_anew_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are kept for a run that was interrupted alone."""
    monkeypatch.setattr(renew, "RESULTS", tmp_path)
    for code, kept in ((2, True), (1, False)):
        rows = tmp_path / "sweep" / "causal-lm-int8.json.jsonl"
        rows.parent.mkdir(exist_ok=True)
        rows.write_text("{}")
        monkeypatch.setattr(renew.subprocess, "run", lambda *_, code=code, **__: SimpleNamespace(returncode=code))
        assert renew.renew("causal-lm-int8", ()) == code
        assert rows.exists() is kept


def test_a_quantizer_that_is_not_installed_leaves_its_table_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run: list[str] = []

    def once(name: str, arguments: object) -> int:
        run.append(name)
        return 0

    monkeypatch.setattr(renew, "renew", once)
    monkeypatch.setattr(
        type(Quantization.parse("torchao-int8").backend), "unavailable", lambda _: "torchao is not installed"
    )
    assert renew.main([]) == 0
    assert run == [name for name in dict(renew.commands()) if name != "causal-lm-torchao-int8"]
    assert "causal-lm-torchao-int8 stays as it is: torchao is not installed" in capsys.readouterr().err
    assert renew.main(["causal-lm-torchao-int8"]) == 0  # which says itself why it cannot run
    assert run[-1] == "causal-lm-torchao-int8"


def test_published_results_name_no_folder_of_a_machine() -> None:
    elsewhere = f"/home/me/.cache/kbitcheck/environments/peft-1/lib/python3.11/site-packages/peft/other.py {renew.ROOT}/kbitcheck/x.py"
    assert renew.ELSEWHERE.sub("", elsewhere) == "peft/other.py kbitcheck/x.py"
    for path in renew.RESULTS.rglob("*.json"):
        assert not re.search(r"(?<![\w./-])/(root|home|tmp|work|Users)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", renew.SWEPT_IN_PAGES)
def test_the_table_of_a_page_is_that_of_its_results(name: str) -> None:
    page = renew.swept_page(renew.SWEPT_IN_PAGES[name]).read_text(encoding="utf-8")
    assert page.split(renew.START)[1].split(renew.END)[0].strip() == renew.swept(name).strip()


def test_a_table_is_written_into_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "sweep" / "masked-lm.md"
    page.parent.mkdir()
    page.write_text(f"before\n{renew.START}\nold\n{renew.END}\nafter\n")
    monkeypatch.setattr(renew, "SWEEP", tmp_path / "sweep.md")
    renew.publish("masked-lm-nf4")
    assert page.read_text() == f"before\n{renew.START}\n{renew.swept('masked-lm-nf4')}{renew.END}\nafter\n"
