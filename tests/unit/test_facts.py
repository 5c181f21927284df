"""Where a case's facts come from: each in one place, of the type that rules read, and in the report whoever computed it."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from functools import cached_property
from typing import Any, get_type_hints

import pytest

from kbitcheck.core import machine
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import Fact, Facts
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.observe.case import STAGES, Case, facts_of
from kbitcheck.observe.open_case import open_case
from kbitcheck.run.subject import load

ATTRIBUTES = {
    "case",
    "profile",
    "freezes",
    "checkpointing",
    "recipe",
    "by_hand",
    "conditions",
    "put_into",
    "seed",
    "composition",
    "adapter",
    "merge",
    "replaced",
}  # set when a case is opened


def test_each_fact_is_computed_in_one_place() -> None:
    places = Counter(name for stage in STAGES for name in facts_of(stage))
    places.update(name for name in Facts.__annotations__ if name in vars(Case))
    assert places == Counter(Facts.__annotations__.keys() - ATTRIBUTES)


def test_a_stage_computes_what_rules_read() -> None:
    expected = get_type_hints(Facts)
    checked = set()
    for stage in (*STAGES, Case):
        types = get_type_hints(stage)
        for name in facts_of(stage):
            member: Any = vars(stage).get(name)
            if isinstance(member, Fact):
                origin = getattr(member, "__orig_class__", None)
                types[name] = origin.__args__[0] if origin else annotated_result(member)
            elif isinstance(member, (property, cached_property)):
                pytest.fail(f"{stage.__name__}.{name} is no Fact: a report would not say that it has been computed")
            if types.get(name) is not None:
                assert types[name] == expected[name], (stage, name)
                checked.add(name)
    assert len(checked) > 30


def annotated_result(fact: Fact[Any]) -> Any:
    """What the function of a fact is annotated to return; None of a lambda."""
    return get_type_hints(fact.compute, vars(sys.modules[fact.compute.__module__])).get("return")


def test_a_case_without_facts_says_why() -> None:
    class Empty(OpenCase):
        def compute(self, name: str) -> Any:
            raise Unavailable(f"no {name}")

    with pytest.raises(Unavailable, match="no memory"):
        _ = Empty(CaseSpec(model="m", quant="nf4", implementation="i")).memory


def test_a_fact_that_raised_is_not_computed_again() -> None:
    class Broken(OpenCase):
        def compute(self, name: str) -> Any:
            large = Held()
            kept.append(weakref.ref(large))
            raise ValueError(f"no {name}")

    class Held:
        pass

    kept: list[weakref.ref[Held]] = []
    case = Broken(CaseSpec(model="m", quant="nf4", implementation="i"))
    results = [judge(rules()["KB401"], case) for _ in range(2)]
    assert [r.status for r in results] == [Status.ERROR] * 2
    assert results[0].reason == results[1].reason != ""
    assert len(kept) == 1
    assert kept[0]() is None  # what the fact held is freed
    case.close()
    judge(rules()["KB401"], case)
    assert len(kept) == 2


def test_a_report_has_the_figures_of_a_fact_that_another_fact_needed() -> None:
    case = open_case(
        CaseSpec(model="tiny:gpt2", quant="nf4", implementation="reference", checkpointing="reentrant"),
        load("reference"),
    )
    assert "activations_by_block" not in case.summary()
    judge(rules()["KB305"], case)
    assert case.summary()["activations"] > case.summary()["checkpointed"] > 0
    case.close()
    assert not case.computed


def test_the_cases_of_a_base_that_draw_alike_share_its_witnesses_but_of_a_large_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bare(implementation: str = "reference", **options: Any) -> Facts:
        spec = CaseSpec(model="tiny:gpt2", quant="nf4", implementation=implementation, **options)
        return open_case(spec, load("reference")).bare

    assert bare() is bare("of somebody else")
    assert bare(checkpointing="reentrant") is not bare(checkpointing="off")  # whose batches are others
    assert bare(profile="qlora") is not bare()
    monkeypatch.setattr(machine, "LARGE_BYTES", 0)
    assert bare(profile="frozen-half") is not bare(profile="frozen-half")
