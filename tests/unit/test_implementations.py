"""Naming what is under test; how a wrong name ends is in tests/cli."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbitcheck.observe.probes.process_state  # noqa: F401  (imports numpy, which cannot be imported twice)
from kbitcheck.core.errors import UsageError
from kbitcheck.run.subject import Missing, describe, load, validate


@pytest.fixture(autouse=True)
def _untouched_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", sys.modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


SOURCE = """
import functools
import sibling

def prepare(model, flag=True):
    return model

class Prepares:
    def __call__(self, model):
        return model

class Holder:
    inner = Prepares()

half = functools.partial(prepare, flag=False)
__version__ = "1.2"
"""


@pytest.mark.parametrize(("attribute", "line"), [("prepare", 5), ("half", 5), ("Holder.inner", 9)])
@pytest.mark.parametrize("where", ["{}/subject_file.py", "subject_file.py", "subject_file"])
def test_any_callable_can_be_named(tmp_path: Path, where: str, attribute: str, line: int) -> None:
    (tmp_path / "subject_file.py").write_text(SOURCE)
    (tmp_path / "sibling.py").write_text("")
    text = f"{where.format(tmp_path)}:{attribute}"
    validate(text)
    found = load(text)
    marker = object()
    assert found.function(marker) is marker
    assert (found.name, found.version, found.file, found.line) == (text, "1.2", str(tmp_path / "subject_file.py"), line)
    assert found.as_json() == {"name": text, "version": "1.2", "file": found.file, "line": line}
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_file_does_not_take_the_place_of_a_module_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def prepare(model): return 'mine'")
    import json

    assert load("json.py:prepare").function(None) == "mine"
    assert sys.modules["json"] is json


def test_a_builtin_has_no_source() -> None:
    assert load("operator:index").line == 0
    assert describe(functools.partial(print)).file == ""


def test_the_packages_own_names() -> None:
    from kbitcheck.run.subject import default

    assert default() == "peft"
    for name in ("reference", "peft"):
        validate(name)


@pytest.mark.parametrize("source", ["raise SystemExit(0)", "1 / 0", "def f(:"])
def test_what_fails_on_import_is_wrong_usage(tmp_path: Path, source: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UsageError, match=r"'bad.py:f' cannot be imported: \w+"):
        load("bad.py:f")


def test_the_advice_of_a_package_that_lacks_something_is_told(tmp_path: Path) -> None:
    (tmp_path / "advises.py").write_text("raise ModuleNotFoundError('pip install advises[cuda]', name='advises')")
    with pytest.raises(Missing, match=r"'advises:f' cannot be imported: .*pip install advises\[cuda\]"):
        load("advises:f")
    with pytest.raises(Missing, match=r"'json.absent:f': no module named 'json.absent'$"):
        load("json.absent:f")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.py").mkdir()
    with pytest.raises(UsageError, match="no such file"):
        validate("x.py:f")
