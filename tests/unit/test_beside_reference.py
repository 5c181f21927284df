"""What could not be judged is the implementation's failure where the reference can be judged, and an ERROR elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kbitcheck.core.cases import REFERENCE, CaseSpec
from kbitcheck.core.events import Judged
from kbitcheck.core.result import Level, Party, Result, Status
from kbitcheck.core.rule import Rule
from kbitcheck.run.beside_reference import settled

SPEC = CaseSpec(model="tiny:llama", quant="nf4", implementation="own:prepare")
LEVELS = {"KB105": Level.MUST, "KB106": Level.SHOULD, "KB201": Level.MUST, "KB202": Level.MUST}
RULES = [Rule(code=code, name=code, level=level, check=lambda facts: ()) for code, level in LEVELS.items()]


def error(code: str, reason: str = "it broke", **event: Any) -> Judged:
    result = Result(rule=code, case=SPEC.id, level=LEVELS[code], status=Status.ERROR, reason=reason)
    return Judged(result=result, **event)


class Reference:
    """Answers with a status for each rule, and notes what it was asked."""

    def __init__(self, statuses: dict[str, Status] | None = None, reached: int = 9) -> None:
        self.statuses, self.reached = statuses or {}, reached
        self.asked: list[tuple[str, list[str], float]] = []

    def __call__(self, spec: CaseSpec, rules: Sequence[Rule], share: float) -> Iterator[Judged]:
        self.asked.append((spec.implementation, [rule.code for rule in rules], share))
        for rule in rules[: self.reached]:
            status = self.statuses.get(rule.code, Status.PASS)
            yield Judged(result=Result(rule=rule.code, case=spec.id, level=rule.level, status=status))


def outcome(errors: Sequence[Judged], reference: Reference) -> dict[str, Status]:
    events = list(settled(SPEC, RULES, errors, reference))
    assert len(events) == len(errors)
    for event in events:
        own = event.result.status is Status.FAIL
        assert (event.result.own, event.result.attributed_to) == (own, Party.IMPLEMENTATION if own else None)
    return {event.result.rule: event.result.status for event in events}


def test_the_first_must_of_a_cause_fails_and_the_others_are_skipped() -> None:
    reference = Reference({"KB201": Status.SKIP})
    errors = [error("KB106"), error("KB201"), error("KB202"), error("KB105", "another cause")]
    skipped = {"KB106": Status.SKIP, "KB201": Status.FAIL, "KB202": Status.SKIP, "KB105": Status.FAIL}
    assert outcome(errors, reference) == skipped
    assert reference.asked == [(REFERENCE, ["KB106", "KB201"], 1.0), (REFERENCE, ["KB105"], 1.0)]


def test_where_there_is_no_must_the_first_fails() -> None:
    assert outcome([error("KB106")], Reference()) == {"KB106": Status.FAIL}


@pytest.mark.parametrize(
    "reference", [Reference({"KB106": Status.ERROR}), Reference({"KB201": Status.ERROR}), Reference(reached=1)]
)
def test_what_the_reference_cannot_be_judged_by_either_stays_an_error(reference: Reference) -> None:
    errors = [error("KB106"), error("KB201")]
    assert outcome(errors, reference) == {"KB106": Status.ERROR, "KB201": Status.ERROR}


def test_no_memory_stays_an_error_and_nobody_asks() -> None:
    reference = Reference()
    assert outcome([error("KB201", short_of="memory")], reference) == {"KB201": Status.ERROR}
    assert reference.asked == []


def test_for_no_time_the_reference_judges_all_in_a_tenth_of_it() -> None:
    reference = Reference()
    assert outcome([error("KB202", short_of="time")], reference) == {"KB202": Status.FAIL}
    assert reference.asked == [(REFERENCE, list(LEVELS), 0.1)]
