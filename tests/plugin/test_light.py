"""The plugin costs a suite that does not use it next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.plugin.conftest import PLUGIN, Run

pytest_plugins = ["pytester"]

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "bitsandbytes",
    "peft",
    "rich",
    "kbitcheck.run.runner",
    "kbitcheck.observe.prepared",
)

CONFTEST = """
import json, pathlib, sys
def pytest_unconfigure(config):
    pathlib.Path("seen").write_text(json.dumps(sorted(sys.modules)))
"""


def modules(pytester: pytest.Pytester, *arguments: str) -> set[str]:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_own="def test_ordinary(): pass")
    assert pytester.runpytest_subprocess(*PLUGIN, *arguments).ret == 0
    return set(json.loads((pytester.path / "seen").read_text()))


def test_an_unrelated_suite_pays_for_nothing(pytester: pytest.Pytester) -> None:
    seen = modules(pytester, "--collect-only")
    assert "kbitcheck.pytest_plugin.runner" in seen
    assert seen & set(HEAVY) == set()


def test_neither_does_it_load_torch_to_collect(run: Run, pytester: pytest.Pytester) -> None:
    seen = modules(pytester, "--collect-only", "--kbit-impl=good.py:prepare")
    assert "kbitcheck.pytest_plugin.items" in seen
    assert seen & {"torch", "transformers", "numpy", "bitsandbytes", "peft", "rich"} == set()


# 30 ms where importing pytest itself takes 135, as on the machine that this was measured on: 18 ms there.
ALLOWED = 30 / 135
SHARE = """
import time
start = time.process_time()
import pytest
between = time.process_time()
import kbitcheck.pytest_plugin
print((time.process_time() - between) / (between - start))
"""


def test_loading_it_is_a_small_part_of_loading_pytest() -> None:
    """Both in one process, so that a busy machine slows them alike; the best of five."""
    shares = [
        float(subprocess.run([sys.executable, "-c", SHARE], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(shares) < ALLOWED, shares
