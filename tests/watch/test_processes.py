"""Two processes are watched, under DDP and FSDP2: each is judged, and one report has both."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Status
from kbitcheck.run.ranks import TOGETHER
from kbitcheck.run.watch import FLATTENED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.watch.processes"]  # fmt: skip


def run(*words):
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    return ended, sorted(re.findall(r"rank \d: \d+\.\d+", ended.stdout))


def watched(tmp_path, *words):
    path = tmp_path / "report.json"
    options = ("--format", "json", "--output", str(path))
    ended, losses = run(sys.executable, "-m", "kbitcheck", "watch", *options, "--", *TORCHRUN, *words)
    return ended, losses, Report.from_json(json.loads(path.read_text()))


def judged(report, status):
    return {rank: {r.rule for r in report if r.case.endswith(rank) and r.status is status} for rank in ("0", "1")}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_make_one_report(kind, tmp_path):
    ended, losses, report = watched(tmp_path, kind)
    assert (ended.returncode, run(*TORCHRUN, kind)[1]) == (0, losses), ended.stderr[-2000:]
    assert len(losses) == 8
    assert set(report.subject["cases"]) == {"watched run, rank 0", "watched run, rank 1"}
    assert judged(report, Status.ERROR) == {"0": set(), "1": set()}
    assert kind == "ddp" or judged(report, Status.FAIL) == {"0": set(), "1": set()}
    for codes in judged(report, Status.PASS).values():
        assert codes >= {"KB104", "KB710", "KB711", "KB712", "KB713", "KB714", "KB715", "KB706"}
        assert ("KB304" in codes) == (kind == "ddp")
    (compared,) = [r for r in report if r.rule == "KB728"]
    assert (compared.case, compared.status) == (TOGETHER, Status.PASS if kind == "ddp" else Status.SKIP)
    said = ended.stderr.splitlines()[-1]
    if kind == "ddp":
        assert "✓ trains as it should" in said
    else:
        assert "gradients were not judged: no block was compared: FSDP shards the model" in said


@pytest.mark.parametrize("kind", ["added", "fsdp"])
def test_a_fault_is_named_on_each_rank(kind, tmp_path):
    ended, _, report = watched(tmp_path, kind, "rate_zero")
    assert ended.returncode == 1
    broken = {r.case: r.rule for r in report if r.status is Status.FAIL and r.level is Level.MUST and r.rule == "KB712"}
    assert len(broken) == 2
    apart = {(r.case, f.where) for r in report if r.rule == "KB728" for f in r.failures}
    assert {case for case, _ in apart} == ({TOGETHER} if kind == "added" else set())
    assert all(".second." in where for _, where in apart)


def test_adapters_that_fsdp_does_not_hold_drift_apart(tmp_path):
    ended, _, report = watched(tmp_path, "ignored")
    assert ended.returncode == 1
    (apart,) = [r for r in report if r.status is Status.FAIL]
    assert (apart.rule, apart.case, len(apart.failures)) == ("KB728", TOGETHER, 6)
    assert all("layers.1.mlp" in f.where and f.actual.endswith("FSDP holds others, and not it") for f in apart.failures)


def said_by(kind):
    """How a run ended that raises, and what is said of it."""
    ended, _ = run(sys.executable, "-m", "kbitcheck", "watch", "--", *TORCHRUN, kind)
    return ended.returncode, ended.stderr.partition("Root Cause")[2], ended.stderr


def test_checkpointing_that_one_rank_switches_on_again_is_told_of_that_rank():
    code, said, _ = said_by("switched_on_again")
    assert code == 1
    once = "rank 1 raised RuntimeError: Expected to mark a variable ready only once"
    assert f"{once}: reentrant checkpointing under DDP: pass use_reentrant=False" in said
    assert "rank 0 raised" not in said or "another process ended first; rank 1" in said


def test_a_unit_of_two_dtypes_is_told_of_each_rank_and_named():
    code, said, whole = said_by("two_dtypes")
    assert code == 1
    assert "rank 0 raised AssertionError: FSDP expects uniform original parameter dtype" in said
    assert "a unit of FSDP2 trains in two dtypes: KB702" in said
    assert "KB215 one-recipe" in whole


def test_adapters_that_ddp_leaves_out_are_named_on_the_rank_where_they_differ(tmp_path):
    ended, _, report = watched(tmp_path, "left_out")
    assert ended.returncode == 1
    (apart,) = [r for r in report if r.status is Status.FAIL and r.level is Level.MUST]
    assert (apart.rule, apart.case, len(apart.failures)) == ("KB728", TOGETHER, 6)
    assert all("layers.1.mlp" in f.where and "on rank 1" in f.actual for f in apart.failures)


def test_what_fsdp_flattens_is_said_not_to_be_judged(tmp_path):
    ended, losses = run(sys.executable, "-m", "kbitcheck", "watch", "--", *TORCHRUN, "fsdp1")
    assert (ended.returncode, len(losses)) == (5, 8), ended.stderr[-2000:]
    said, verdict = ended.stderr.splitlines()[-2:]
    assert said == f"kbitcheck: {FLATTENED}"
    assert verdict == "kbitcheck: ✗ nothing was checked"
