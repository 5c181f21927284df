"""Every rule on the kernels of a real device."""

import json
import subprocess
import sys

import pytest

TWO_MINUTES = 120


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["nf4", "nf4,double", "int8"])
def test_the_reference_conforms_on_cuda(quant):
    command = [sys.executable, "-m", "kbitcheck", "impl", "reference", "--quant", quant, "--device", "cuda"]
    ran = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, timeout=5 * TWO_MINUTES)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    report = json.loads(ran.stdout)
    judged = {r["rule"] for r in report["results"] if r["status"] in ("PASS", "FAIL")}
    assert {"KB303", "KB304", "KB405", "KB602"} <= judged
