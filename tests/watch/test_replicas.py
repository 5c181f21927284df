"""KB728: what ranks hold, compared: which tensors differ, on which rank, from which step on, and why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kbitcheck.core.facts import Replica
from kbitcheck.core.result import Status
from kbitcheck.run.ranks import Rank, merged
from kbitcheck.run.watch_settings import Settings
from tests.watch.replicas import RUNS
from tests.watch.runs import plain
from tests.watch.test_watched_runs import train

ROOT = Path(__file__).parents[2]
SCRIPT = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "-m",
    "tests.watch.replicas",
]


@pytest.fixture(scope="module")
def own_report():
    """Of a process that trains alone."""
    _, _, watched = train(plain, steps=1, select=["KB728"])
    assert watched.replicas == []
    return watched.report


def judged(own_report, *replicas):
    """The result of KB728 on the reports of these ranks."""
    report = type(own_report).from_json({**own_report.as_json(), "subject": {**own_report.subject, "ranks": 2}})
    ranks = [Rank(report, [each]) for each in replicas]
    (result,) = merged(ranks, Settings(select=["KB728"])).results
    return result


def held(rank, *steps, **fields):
    digests = tuple(dict(zip("ab", step, strict=False)) for step in steps)
    return Replica(rank=rank, peers=(0, 1, 2), steps=digests, wrapped=True, **fields).as_json()


def test_the_rank_that_differs_from_most_is_named(own_report):
    """Digests of two tensors, step by step."""
    replicas = held(0, "11", "23"), held(1, "11", "24"), held(2, "11", "23", leaves_out=frozenset("b"))
    result = judged(own_report, *replicas)
    assert result.status is Status.FAIL
    ((where, actual),) = [(f.where, f.actual) for f in result.failures]
    assert (where, actual) == ("b", "otherwise on rank 1 from step 2 on: DistributedDataParallel does not hold it")


def test_ranks_that_hold_the_same_pass_and_say_who_was_not_looked_at(own_report):
    result = judged(own_report, held(0, "11", "23"), held(1, "11", "23", "45"))
    assert (result.status, result.examined, result.reason) == (Status.PASS, 2, "")
    assert result.notes == ("1 more ranks train with these and were not watched here",)


@pytest.mark.parametrize(
    ("replicas", "reason"),
    [
        ([held(0, "11")], "one process was watched"),
        ([held(0, "11"), held(1, "11")], "no second one was looked at"),
        ([held(0, ""), held(1, "")], "what trains is sharded"),
    ],
)
def test_what_cannot_be_compared_is_said(own_report, replicas, reason):
    result = judged(own_report, *replicas)
    assert result.status is Status.SKIP
    assert reason in result.reason


def test_stages_of_a_pipeline_are_not_compared(own_report):
    first, second = ({**held(rank, "11", "11"), "wrapped": False} for rank in (0, 1))
    second["steps"] = [{"c": "1"}, {"c": "1"}]
    assert "as stages of a pipeline" in judged(own_report, first, second).reason


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    ended = subprocess.run([*SCRIPT, str(folder)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


UNALIKE = "otherwise on rank 1 from step {} on{}"
OUTSIDE = ": DistributedDataParallel does not hold it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "which", "matrix", "actual"),
    [
        ("left_out", "layers.1.mlp", "lora_B", UNALIKE.format(2, OUTSIDE)),
        ("added", ".second.", "lora_A", UNALIKE.format(1, OUTSIDE)),
        ("added", ".second.", "lora_B", UNALIKE.format(2, OUTSIDE)),
        ("ddp skips", "", "lora_B", UNALIKE.format(2, "")),
    ],
)
def test_ranks_that_drift_apart_are_named(seen, own_report, run, which, matrix, actual):
    result = judged(own_report, *(each for rank in seen for each in rank[run]))
    assert result.status is Status.FAIL
    assert {f.actual for f in result.failures if matrix in f.where} == {actual}
    assert all(which in f.where for f in result.failures)


@pytest.mark.slow
def test_ranks_under_ddp_and_fsdp_are_sound(seen, own_report):
    results = {run: judged(own_report, *(each for rank in seen for each in rank[run])) for run in ("ddp", "fsdp")}
    assert (results["ddp"].status, results["ddp"].notes) == (Status.PASS, ())
    assert (results["fsdp"].status, results["fsdp"].examined) == (Status.SKIP, 0)
    assert "what trains is sharded" in results["fsdp"].reason
    assert len(RUNS) == len(seen[0])
