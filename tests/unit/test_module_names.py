"""Names of modules are read off their sources, and only what is surely absent is refused."""

import pytest

from kbitcheck.run import module_names
from kbitcheck.run.subject import Missing, validate


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from a import f, g as h\nimport b.c\n", {"f", "h", "b"}),
        ("def f(): ...\nclass C: ...\nx: int = 1\ny, z = 1, 2\n", {"f", "C", "x", "y", "z"}),
        ("try:\n    from a import f\nexcept ImportError:\n    f = None\n", {"f"}),
        ("from a import *\n", None),
        ("def __getattr__(name): ...\n", None),
        ("globals()['f'] = 1\n", None),
        ("def f(:\n", None),
        ("raise ModuleNotFoundError('install it so')\n", None),
    ],
)
def test_names_that_a_source_binds(source, names):
    assert module_names.names_in(source) == names


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "ours" / "preparing.py").write_text("def prepare(model): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ours.prepering:prepare", r"no module named 'ours.prepering' \(did you mean preparing\?\)"),
        ("ours.preparing:prepar", r"ours.preparing has no attribute 'prepar' \(did you mean prepare\?\)"),
        ("ours.preparing.x:prepare", r"no module named 'ours.preparing.x'"),
    ],
)
def test_a_wrong_path_is_refused_without_an_import(package, text, why):
    with pytest.raises(Missing, match=why):
        validate(text)


def test_a_path_that_may_be_right_is_not_refused(package):
    validate("ours.preparing:prepare")
    (package / "__init__.py").write_text("__path__ = []")
    validate("ours.elsewhere:prepare")
    (package / "preparing.py").write_text("from other import *")
    validate("ours.preparing:prepar")
