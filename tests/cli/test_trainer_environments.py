"""A trainer is installed into an environment of its own, and what it does is judged. Needs a package index: ``KBITCHECK_NETWORK=1``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kbitcheck.core.report import Report
from kbitcheck.core.result import Status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("KBITCHECK_NETWORK") != "1", reason="needs a package index: KBITCHECK_NETWORK=1"),
]


def judged(name: str, folder: Path) -> tuple[int, Report]:
    saved = folder / "report.json"
    words = ["model", "tiny:llama", "--quant", "nf4", "--prepare", name, "--format", "json", "--output", str(saved)]
    ended = subprocess.run([sys.executable, "-m", "kbitcheck", *words], capture_output=True, text=True, check=False)
    assert saved.exists(), ended.stderr[-2000:]
    return ended.returncode, Report.from_json(json.loads(saved.read_text()))


def test_trl_is_ready(tmp_path: Path) -> None:
    code, report = judged("trl", tmp_path)
    results = {result.rule: result.status for result in report}
    assert (code, Status.ERROR in results.values()) == (0, False)
    assert results["KB308"] is results["KB404"] is results["KB513"] is Status.PASS


def test_llamafactory_breaks_what_it_patches_alone(tmp_path: Path) -> None:
    """Its import replaces a function of transformers."""
    code, report = judged("llamafactory", tmp_path)
    broken = {result.rule: result for result in report if result.status is Status.FAIL}
    assert (code, set(broken)) == (1, {"KB513"})
    assert [f.where for f in broken["KB513"].failures] == [
        "transformers.utils.import_utils._is_package_available, after import"
    ]
