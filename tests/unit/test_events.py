"""Events cross a pipe unchanged, and a collector gathers what a report needs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kbitcheck.core import events
from kbitcheck.core.facts import Passes
from kbitcheck.core.plan import Item, Plan
from kbitcheck.core.result import Level, Observation, Result, Status

FAILED = Result(
    rule="KB101",
    case="c",
    level=Level.MUST,
    status=Status.FAIL,
    failures=(Observation("a", "1", "2", ok=False),),
    notes=("n",),
)
PLAN = Plan(
    case="c",
    opening=1.0,
    items=(
        Item(
            fact="run", on="whole", passes=Passes(forwards=1), seconds=2.0, nbytes=3, rules=("KB101",), left_out="dear"
        ),
    ),
)
EXAMPLES = [
    events.Ready(),
    events.Loaded(implementation={"name": "peft"}, environment={"seed": 0}),
    events.Started(case="c"),
    events.Planned(plan=PLAN),
    events.Computing(case="c", fact="run", left=1.5),
    events.Judged(result=FAILED, fatal=True),
    events.Figures(case="c", facts={"parameters": 3}),
    events.Architectures(classes={"llama": "Llama"}),
    events.FaultTried(code="KB101", fault="f", case="c", caught=None, reason="r", kills=("KB101", "KB102")),
    events.Done(),
    events.WrongUsage(message="m", missing=True, traceback="t"),
    events.Broken(cause="c", fatal=True, traceback="t"),
]


def test_every_kind_has_an_example() -> None:
    assert [type(e) for e in EXAMPLES] == list(events.KINDS.values())


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda e: type(e).__name__)
def test_an_event_survives_the_pipe(event: events.Event) -> None:
    assert events.from_json(json.loads(json.dumps(event.as_json()))) == event


@pytest.mark.parametrize(
    "data", [[], {}, {"event": "Nonsense"}, {"event": "Started"}, {"event": "Started", "case": "c", "x": 1}, "junk",
             {"event": "Judged", "result": {}}]
)  # fmt: skip
def test_what_is_no_event_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="no event"):
        events.from_json(data)


def test_a_collector_gathers_settled_results_facts_and_what_was_loaded() -> None:
    collector = events.Collector(lambda result, environment: dataclasses.replace(result, finding="f"))
    passed_on = [collector.add(event) for event in EXAMPLES]
    assert collector.results == [dataclasses.replace(FAILED, finding="f")]
    assert passed_on[5] == events.Judged(result=collector.results[0], fatal=True)
    assert passed_on[0] is EXAMPLES[0]
    assert collector.facts == {"c": {"parameters": 3}}
    assert collector.loaded == EXAMPLES[1]
