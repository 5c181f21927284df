"""What facts declare that they cost and need is what they take, and what a rule's source reads is what it reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch

from kbitcheck.core import machine
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import Facts, Passes
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, select
from kbitcheck.observe import loaded
from kbitcheck.observe.open_case import costs, open_case
from kbitcheck.observe.passes import OPENING, Counts, counted
from kbitcheck.run.subject import load
from tests.shallow import shallow

pytestmark = pytest.mark.xdist_group("costs")  # two are of one case
WITNESSES = {"unprepared", "bare"}  # read after a failure
SETTINGS = {
    "case",
    "profile",
    "freezes",
    "checkpointing",
    "recipe",
    "conditions",
    "put_into",
    "seed",
    "by_hand",
    "adapter",
    "merge",
    "replaced",
    "composition",
}
PATHS = {"_paths"}  # read first, where a fact may be a cut's
WITH_A_CUT = {"evaluation", "_paths", "_trained", "_usual"}
IN_PROCESSES = {"unwatched"}  # which start a process
CONFIGURED = {"start"}  # of adapters of a configuration alone
# Read with a cut alone, where attaching freezes the base, where biases are quantized, or to say more of a failure.
ELSEWHERE = {
    "KB210": {"evaluation"},
    "KB101": {"wrapped"},
    "KB202": {"loaded"},
    "KB104": {"bias_after_forward"},
    "KB302": {"layer_backwards"},
    "KB303": {"wrapped"},
    "KB305": {"compute_ulp"},
    "KB309": {"compute_ulp", "gradients", "base", "wrapped"},
    "KB501": {"base"},
    "KB510": {"compute_ulp"},
    "KB515": {"compute_ulp"},
}


@dataclasses.dataclass
class Counted:
    counts: Counts
    reads: Mapping[str, set[str]]
    statuses: Mapping[str, Status]


def examined(seed: int) -> Counted:
    """All rules on a base that no other test has, prepared by the reference."""
    spec = CaseSpec(
        model="tiny:llama", quant="nf4", implementation="reference", checkpointing="reentrant", seed=seed, cut="never",
        conditions="the norms thawed",
    )  # fmt: skip
    reads, statuses = {}, {}
    with (
        mock.patch("bitsandbytes.nn.modules.has_avx512bf16", return_value=False),  # else KB308 takes more steps
        mock.patch.object(loaded, "source_of", lambda spec: shallow(spec.model)),
        torch.compiler.set_stance("force_eager"),
        counted() as counts,
    ):
        reference = load("reference")
        case = open_case(spec, dataclasses.replace(reference, function=counts.calls(reference.function)))
        for rule in select():
            code = rule.code
            counts.reads[OPENING] = set()
            statuses[code] = judge(rule, case).status
            reads[code] = counts.reads[OPENING]
        case.close()
    return Counted(counts, reads, statuses)


@pytest.fixture(scope="module")
def healthy() -> Counted:
    return examined(seed=1_000_003)


@pytest.mark.transformers5("before it, loading copies the model once more")
@pytest.mark.parametrize("large", [False, True])
def test_each_fact_takes_the_passes_that_it_declares(
    large: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(machine, "LARGE_BYTES", 0)
    counted = examined(seed=1_000_033) if large else request.getfixturevalue("healthy")
    declared = {
        name: cost.passes
        for name, cost in costs(large=large).items()
        if cost.passes != Passes() and name not in WITH_A_CUT | IN_PROCESSES | CONFIGURED
    }
    assert {n: p for n, p in counted.counts.by_fact.items() if n != OPENING} == declared
    _needs_hold(counted, large=large)


def _needs_hold(counted: Counted, *, large: bool) -> None:
    """Each fact read the facts that it declares."""
    declared = costs(large=large)
    stages = {name for cost in declared.values() for name in cost.needs if name.startswith("_")}
    for name, cost in declared.items():
        if name in CONFIGURED or (name == "_trained" and large):  # without a cut its steps are those of ``_descended``
            continue
        if name in counted.counts.by_fact or name in counted.counts.reads:
            stage = {need for need in cost.needs[:1] if need in stages}  # which all facts of a stage need
            assert counted.counts.reads[name] | stage == set(cost.needs) | (counted.counts.reads[name] & PATHS), name


def test_a_rule_reads_what_its_source_says(healthy: Counted) -> None:
    passed = [rule for rule in select() if healthy.statuses[rule.code] is Status.PASS]
    expected = {rule.code: (Facts.__annotations__.keys() & rule.reads) - WITNESSES - SETTINGS for rule in passed}
    read = {rule.code: healthy.reads[rule.code] | ELSEWHERE.get(rule.code, set()) for rule in passed}
    assert read == expected
    assert len(passed) > 50


def test_what_a_fact_needs_is_a_fact() -> None:
    assert {need for cost in costs().values() for need in cost.needs} <= costs().keys()
    assert Facts.__annotations__.keys() - SETTINGS <= costs().keys()


@pytest.mark.transformers5("before it, loading copies the model once more")
def test_the_published_counts_are_those_that_facts_declare() -> None:
    published = json.loads((Path(__file__).parents[2] / "results" / "passes.json").read_text(encoding="utf-8"))
    declared = {
        n: c.passes
        for n, c in costs().items()
        if c.passes != Passes() and n not in WITH_A_CUT | IN_PROCESSES | CONFIGURED
    }
    assert {name: Passes(**passes) for name, passes in published.items()} == declared


def test_cases_of_one_base_share_what_no_mode_changes() -> None:
    """The calls that name no mode, and the comparison of a step that is bitwise that of the other mode."""
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="reference", checkpointing="reentrant", seed=977)
    shared = ("default_call", "positional_call", "refused", "single_blockwise")
    with torch.compiler.set_stance("force_eager"), counted() as counts:
        reference = load("reference")
        implementation = dataclasses.replace(reference, function=counts.calls(reference.function))
        taken, facts = [], []
        for mode in ("reentrant", "non-reentrant"):
            before = counts.by_fact
            case = open_case(dataclasses.replace(spec, checkpointing=mode), implementation)
            facts.append([getattr(case, name) for name in shared])
            none = Passes()
            taken.append({n: p for n, p in counts.by_fact.items() if p != before.get(n, none)})
            case.close()
    assert facts[0] == facts[1]
    assert {*taken[0]} >= {"default_call", "positional_call", "refused", "_single_row"}
    assert not {"default_call", "positional_call", "refused"} & {*taken[1]}
    assert counts.by_fact["_single_row"].float64_forwards == 1
    assert counts.by_fact["_training_forwards"].forwards == 2 * 4
    assert "forwards" not in taken[0]  # no rule that needs a step alone runs a model in eval mode
    assert counts.by_fact["_single_row"].backwards == 3  # a step of each case, and the twin's
