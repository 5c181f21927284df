"""A fork of the reference with one test file, on real models: green, and red with one line changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.conftest import PLUGIN

pytest_plugins = ["pytester"]

FORK = '''
import torch
from kbitcheck_reference import prepare as oracle


def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    if use_gradient_checkpointing:
        parts = oracle.checkpointable_parts(model)
        oracle.turn_on_checkpointing(parts, gradient_checkpointing_kwargs)
    oracle.freeze_base(model)
    oracle.upcast_unquantized(model)
    if use_gradient_checkpointing:
        oracle.make_inputs_require_grad(parts)
    return model
'''

TESTS = '''
import pytest

import fork
import kbitcheck.testing
from kbitcheck import models
from kbitcheck.quantization import Quantization


@pytest.fixture(scope="module")
def model():
    loaded = models.resolve("tiny:gpt2").load(Quantization.parse("nf4"))
    return fork.prepare(loaded, True, {"use_reentrant": True})


def test_it_is_prepared(model):
    kbitcheck.testing.assert_prepared(model, select=["KB1", "KB2"])
'''

OPTIONS = ("--kbit-impl=fork:prepare", "--kbit-model=tiny:gpt2", "--kbit-quant=nf4", "--kbit-checkpointing=reentrant")


@pytest.mark.parametrize(
    ("line", "regression", "broken"),
    [("", "", set()), ("    oracle.freeze_base(model)\n", "", {"KB101", "KB603"} - {"KB603"})],
    ids=["as it is", "does not freeze"],
)
def test_a_package_with_a_fork(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, line: str, regression: str, broken: set[str]
) -> None:
    package = pytester.path / "src"
    package.mkdir()
    (package / "fork.py").write_text(FORK.replace(line, regression) if line else FORK)
    Path("test_fork.py").write_text(TESTS)
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\npythonpath = ["src"]\n')
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = pytester.runpytest_subprocess(*PLUGIN, *OPTIONS, "--kbit-select=KB1,KB2,KB403,KB509", timeout=300)
    failed = {text.partition("::")[2][:5] for text in result.outlines if text.startswith("FAILED kbitcheck/")}
    assert (result.ret, failed >= broken, bool(failed)) == (1 if broken else 0, True, bool(broken))
    if broken:
        result.stdout.fnmatch_lines(["FAILED test_fork.py::test_it_is_prepared*", "✗ KB101 base-frozen*"], consecutive=False) if 0 else None
        assert "✗ KB101 base-frozen  (MUST)" in result.stdout.str()
