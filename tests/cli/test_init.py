"""``kbitcheck init`` writes what is missing, and changes nothing that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kbitcheck.run.candidates import candidates
from tests.cli.conftest import Door

PREPARE = "def prepare(model, use_gradient_checkpointing=True):\n    return model\nprepare.please = True\n"
WORKFLOW = ".github/workflows/kbitcheck.yml"


def test_a_fork_gets_a_configuration_a_workflow_and_a_ledger(door: Door) -> None:
    (door.cwd / "mine.py").write_text(PREPARE)
    ran = door("init")
    assert ran.returncode == 0, ran.stderr
    assert "kbitcheck.toml is written" in ran.stderr
    assert door("config", "implementation").stdout == "mine:prepare\n"
    steps = yaml.safe_load((door.cwd / WORKFLOW).read_text())["jobs"]["gate"]["steps"]
    assert steps[-1] == {"run": "kbitcheck gate"}
    ledger = door.cwd / "kbitcheck-ledger.toml"
    ledger.write_text(ledger.read_text().replace('reason = ""', 'reason = "the stack is not ours"'))
    assert door("gate").returncode == 0
    before = {path: path.read_text() for path in door.cwd.rglob("*") if path.is_file()}
    again = door("init")
    assert (again.returncode, again.stderr.count("is there already, and stays as it is")) == (0, 3)
    assert {path: path.read_text() for path in door.cwd.rglob("*") if path.is_file()} == before


def test_a_file_that_is_there_is_not_changed_and_says_what_to_write(door: Door) -> None:
    (door.cwd / "pyproject.toml").write_text("[tool.kbitcheck]\nstrict = true\n")
    ran = door("init", "good:prepare", "--no-ledger")
    assert ran.returncode == 0
    assert 'write into it: implementation = "good:prepare"' in ran.stderr
    assert (door.cwd / "pyproject.toml").read_text() == "[tool.kbitcheck]\nstrict = true\n"
    assert not (door.cwd / "kbitcheck.toml").exists()
    assert not (door.cwd / "kbitcheck-ledger.toml").exists()


def test_reasons_that_are_missing_are_asked_for(door: Door) -> None:
    ran = door("init", "nothing.py:prepare")
    assert ran.returncode == 0, ran.stderr
    entries = (door.cwd / "kbitcheck-ledger.toml").read_text().count('reason = ""')
    assert f"kbitcheck-ledger.toml is written; {entries} entries have no reason yet" in ran.stderr
    assert "broken MUSTs of nothing.py:prepare: KB103; mend these" in ran.stderr
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) < 10  # what each rule found, `kbitcheck impl` shows
    assert door("gate").returncode == 1


@pytest.mark.parametrize(
    ("sources", "line"),
    [
        ((), "no function here looks like a preparation; write kbitcheck init IMPL"),
        (("a.py", "b.py"), "there are several: a:prepare, b:prepare; write kbitcheck init IMPL"),
    ],
)
def test_none_or_several_are_one_line(door: Door, sources: tuple[str, ...], line: str) -> None:
    for name in sources:
        (door.cwd / name).write_text(PREPARE)
    ran = door("init")
    assert (ran.returncode, ran.stderr.count("\n")) == (4, 1)
    assert line in ran.stderr
    assert not (door.cwd / "kbitcheck.toml").exists()


def test_candidates_have_pefts_name_or_its_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = {
        "pkg/__init__.py": "",
        "pkg/prep.py": PREPARE,
        "src/own_pkg/other.py": PREPARE,
        "tests/test_x.py": PREPARE,
        "broken.py": "use_gradient_checkpointing = (",
        "env/lib/x.py": PREPARE,
        "env/pyvenv.cfg": "",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert candidates(tmp_path) == ["pkg.prep:prepare", "src/own_pkg/other.py:prepare"]
    (tmp_path / "fork.py").write_text("def prepare_model_for_kbit_training(model): ...\n")
    assert candidates(tmp_path) == ["fork:prepare_model_for_kbit_training"]
