"""The cases of compositions, and what rules make of their processes."""

from __future__ import annotations

from math import comb
from types import SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.compositions import COMPOSITIONS
from kbitcheck.core.errors import Raised, UsageError
from kbitcheck.core.facts import YARDSTICKS, CompositionFacts, Distance, ProcessFacts
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import judge, rules, select
from kbitcheck.run.suites import suite_cases

READY_TWICE = Raised(
    "RuntimeError", "Expected to mark a variable ready only once.", "", "mark a variable ready only once"
)


def process(name: str = "rank 0", **fields: Any) -> ProcessFacts:
    gradients = {"a (step 1)": Distance(equal=True, relative=0.0, yardstick=0.01)}
    numbers = {"before step 1": {"a": "1"}, "after step 1": {"a": "2"}}
    return ProcessFacts(**{"name": name, "gradients": gradients, "numbers": numbers, "runs": {"block": 2.0}, **fields})


class Composed(OpenCase):
    """A case whose processes are known."""

    def __init__(self, kind: Any, *processes: ProcessFacts, unprepared: Any = None) -> None:
        super().__init__(CaseSpec(model="m", quant="nf4", implementation="i", composition=kind))
        self.composition = CompositionFacts(kind=kind, alone=process("alone"), processes=processes)
        self.unprepared: Any = unprepared or SimpleNamespace(put_into=kind, composition=self._sound(kind))

    def _sound(self, kind: str) -> CompositionFacts:
        sound = tuple(process(p.name) for p in self.composition.processes)
        return CompositionFacts(kind=kind, alone=process("alone"), processes=sound)

    def cut_behind(self, reads: Any) -> str:
        return ""


def failures(code: str, case: OpenCase) -> list[tuple[str, str]]:
    result = judge(rules()[code], case)
    assert result.status in (Status.PASS, Status.FAIL), result.reason
    return [(f.where, f.actual) for f in result.failures]


def test_two_honest_roundings_are_four_yardsticks_apart_less_than_once_in_a_million() -> None:
    """The F distribution of n and n degrees, n even, beyond 4 squared: an incomplete beta function, here a sum."""

    def beyond(n: int) -> float:
        p = 1 / (1 + YARDSTICKS**2)
        return sum(comb(n - 1, j) * p**j * (1 - p) ** (n - 1 - j) for j in range(n // 2, n))

    assert beyond(16) < 1e-6 < beyond(14)


def test_the_suite_crosses_all_compositions_with_modes_and_quantizations() -> None:
    specs = suite_cases("composition", implementation="x")
    assert {spec.composition for spec in specs} == set(COMPOSITIONS)
    assert len(specs) == len(COMPOSITIONS) * 3 * 2
    assert {spec.adapters for spec in specs} == {"peft"}
    assert len({spec.id for spec in specs}) == len(specs)
    assert set(specs) < set(suite_cases("full", implementation="x"))
    assert not any(spec.composition for spec in suite_cases("quick", implementation="x"))
    named = suite_cases("quick", compositions=["ddp"], models=["tiny:gpt2"], checkpointing=["off"], implementation="x")
    assert [spec.id for spec in named] == ["tiny:gpt2-nf4-off-ddp", "tiny:gpt2-int8-off-ddp"]


def test_rules_of_compositions_judge_no_other_case() -> None:
    codes = {rule.code for rule in select(about={"composition"})}
    assert {"KB701", "KB708", "KB745"} <= codes
    assert not codes & {rule.code for rule in select()}
    assert codes < {rule.code for rule in select(about={"composition", "model"})}
    with pytest.raises(UsageError, match="KB701 is not about a model"):
        select(["KB701"])


def test_sound_ranks_pass_and_another_composition_is_skipped() -> None:
    case = Composed("ddp", process(), process("rank 1"))
    assert failures("KB701", case) == []
    assert judge(rules()["KB741"], case).status is Status.SKIP


def test_a_wrong_gradient_is_reported_on_its_rank_with_what_it_is() -> None:
    off = {"a (step 1)": Distance(equal=False, relative=0.5, yardstick=0.01)}
    rank = process("rank 1", gradients=off, resembles={"a (step 1)": "that of the batch of rank 1 alone"})
    assert failures("KB701", Composed("ddp", process(), rank)) == [
        ("rank 1: a (step 1)", "that of the batch of rank 1 alone")
    ]
    within = {"a (step 1)": Distance(equal=False, relative=0.039, yardstick=0.01)}
    assert failures("KB701", Composed("ddp", process(), process("rank 1", gradients=within))) == []


def test_ranks_that_hold_other_adapters_are_reported() -> None:
    rank = process("rank 1", numbers={"before step 1": {"a": "9"}, "after step 1": {"a": "2"}})
    assert failures("KB701", Composed("ddp", process(), rank)) == [
        ("rank 1: adapters before step 1", "1 of 1 differ, a among them")
    ]


def test_a_rank_that_another_one_ended_is_not_at_fault_and_the_cause_is_named() -> None:
    case = Composed("ddp", process(ended_by="rank 1"), process("rank 1", raised=READY_TWICE, gradients={}))
    ((where, actual),) = failures("KB701", case)
    assert where == "rank 1"
    assert "reentrant checkpointing under DDP" in actual
    assert judge(rules()["KB744"], case).status is Status.SKIP


@pytest.mark.parametrize(("same", "party"), [(True, Party.STACK), (False, Party.IMPLEMENTATION)])
def test_what_the_unprepared_base_raises_in_the_same_process_is_the_stacks(same: bool, party: Party) -> None:
    broken = process(raised=READY_TWICE if same else Raised("ValueError", "no"), gradients={})
    unprepared = SimpleNamespace(
        put_into="ddp", composition=CompositionFacts(kind="ddp", alone=process("alone"), processes=(broken,))
    )
    result = judge(rules()["KB701"], Composed("ddp", process(raised=READY_TWICE, gradients={}), unprepared=unprepared))
    assert [f.party for f in result.failures] == [party]


PASS = {"adapters": "x", "optimizer": "o", "scheduler": "s", "loss": "l", "gradients": "g", "adapters behind it": "y"}


@pytest.mark.parametrize(
    ("third", "said"),
    [
        ({}, ""),
        ({"adapters": "z", "loss": "m"}, "not continued: adapters"),
        ({"scheduler": "r", "optimizer": "p"}, "not continued: optimizer, scheduler"),
        ({"loss": "m"}, "other loss: the base, or its dropout, is another"),
        (
            {"gradients": "h", "adapters behind it": "z"},
            "other gradients, adapters behind it: the base, or its checkpointing",
        ),
        ({"adapters behind it": "z"}, "other adapters behind it: the optimizer is another"),
    ],
)
@pytest.mark.parametrize("kind", ["resume", "trainer-resume"])
def test_what_a_resumed_run_lacks_is_named(kind: str, third: dict[str, str], said: str) -> None:
    whole = process("the whole run", passes=({}, {"optimizer": "first"}, PASS, PASS), saved_behind=2)
    seen = failures("KB708", Composed(kind, whole, process("the resumed run", passes=({**PASS, **third}, PASS))))
    assert [where for where, _ in seen] == ["pass 3"] * bool(said)
    assert all(said in actual for _, actual in seen)


def test_a_run_that_starts_again_in_place_of_being_resumed_is_reported() -> None:
    whole = process("the whole run", passes=(PASS, PASS), saved_behind=1)
    case = Composed("trainer-resume", whole, process("the resumed run", passes=(PASS, PASS)))
    assert failures("KB708", case) == [("the resumed run", "2 passes")]


def test_blocks_that_run_less_often_and_another_mode_are_reported() -> None:
    lost = process("the Trainer", runs={"block": 1.0}, reentrant=("True",))
    assert failures("KB745", Composed("trainer", lost)) == [
        ("the Trainer: use_reentrant", "True"),
        ("the Trainer: block", "1"),
    ]


def test_a_gradient_in_the_dtype_that_a_trainer_cast_to_is_rounded_to_it() -> None:
    torch = pytest.importorskip("torch")
    from kbitcheck.observe.composition.launch import facts_of

    expected = {"a (step 1)": torch.linspace(1, 2, 64)}
    alone = {"name": "alone", "gradients": expected, "rounded": expected, "changed": ()}
    cast = {"a (step 1)": expected["a (step 1)"].bfloat16()}
    for gradients, sound in ((cast, True), ({"a (step 1)": 1.1 * expected["a (step 1)"]}, False)):
        case = Composed("sft", facts_of({"name": "the SFTTrainer", "gradients": gradients}, alone))
        assert (failures("KB742", case) == []) == sound
