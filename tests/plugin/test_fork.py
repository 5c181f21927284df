"""A fork of the reference with one test file, on real models: green, and red with one line changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.conftest import PLUGIN

pytest_plugins = ["pytester"]

FORK = """
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
"""

TESTS = """
import pytest

import fork
import kbitcheck.testing
from kbitcheck.backends.quantization import Quantization
from kbitcheck.models.sources.resolve import resolve


@pytest.fixture(scope="module")
def model():
    loaded = resolve("tiny:gpt2").load(Quantization.parse("nf4"))
    return fork.prepare(loaded, True, {"use_reentrant": True})


def test_it_is_prepared(model):
    kbitcheck.testing.assert_prepared(model, select=["KB1", "KB2"])
"""

OPTIONS = ("--kbit-impl=fork:prepare", "--kbit-model=tiny:gpt2", "--kbit-quant=nf4", "--kbit-checkpointing=reentrant")


@pytest.mark.slow
@pytest.mark.parametrize(("line", "broken"), [("", set()), ("    oracle.freeze_base(model)\n", {"KB101"})])
def test_a_package_with_a_fork(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, line: str, broken: set[str]
) -> None:
    """Green as it is; without ``line`` red, and the rule is named: by its test, and by the user's own assertion."""
    package = pytester.path / "src"
    package.mkdir()
    (package / "fork.py").write_text(FORK.replace(line, "") if line else FORK)
    Path("test_fork.py").write_text(TESTS)
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\npythonpath = ["src"]\n')
    for name, value in (("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1"), ("TORCHDYNAMO_DISABLE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CI", "1")  # there pytest does not cut the lines of its short summary
    result = pytester.runpytest_subprocess(*PLUGIN, *OPTIONS, "--kbit-select=KB1,KB2,KB403,KB509", timeout=300)
    failed = {text.partition("::")[2][:5] for text in result.outlines if text.startswith("FAILED kbitcheck/")}
    assert (result.ret, failed) == (1 if broken else 0, broken)
    own = [text for text in result.outlines if text.startswith("FAILED test_fork.py")]
    assert len(own) == len(broken)
    # Item and assertion tell it as errors, the controller once for all; of the summary only the assertion's is whole.
    output = result.stdout.str()
    assert (output.count("✗ KB101 base-frozen"), output.count("You will see:")) == ((5, 4) if broken else (0, 0))
