"""The events of one case, in whatever process it is judged. No torch here."""

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Short, short_of
from kbitcheck.core.events import Computing, Event, Figures, Judged
from kbitcheck.core.plan import display_name
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import Rule, judge


def examine(
    case: Any, rules: Sequence[Rule], *, device: str = "cpu", tell: Callable[[Event], object] = lambda event: None
) -> Iterator[Event]:
    """A ``Judged`` for each rule and the case's ``Figures``; closes the case. ``tell`` gets a ``Computing`` for each fact.

    An ERROR is fatal where it may leave the process in a state that the next case would suffer from: memory ran out, or
    the case runs on an accelerator.
    """
    with contextlib.closing(case):
        _watch(case, tell)
        for name in case.in_a_row:
            with contextlib.suppress(Exception):  # the rule that reads it gets the same
                getattr(case, name)
        for rule in rules:
            raised: list[Exception] = []
            result = judge(rule, case, on_error=raised.append)
            short: Short = next((short_of(error) for error in raised if short_of(error)), "")
            yield Judged(
                result=result,
                fatal=result.status is Status.ERROR and (short == "memory" or device != "cpu"),
                short_of=short,
            )
        yield Figures(case=case.case, facts=case.summary())


def _watch(case: Any, tell: Callable[[Event], object]) -> None:
    """Report the innermost fact that takes passes, whenever another one begins."""
    budget, computed = case.budget, case.computed

    def watch() -> None:
        if fact := next(filter(budget.planner.takes_passes, reversed(computed.at_hand)), None):
            tell(Computing(case=case.case, fact=display_name(fact), left=round(budget.left, 1)))

    if budget is not None:
        computed.watch = watch


def judging(spec: CaseSpec, rules: Sequence[Rule]) -> list[Rule]:
    """The rules that are about what the case is of."""
    return [rule for rule in rules if rule.about == spec.about]


def not_reached(
    spec: CaseSpec, rules: Sequence[Rule], reached: Container[str], reason: str, short_of: Short = ""
) -> Iterator[Judged]:
    """An ERROR for every rule that the case did not reach."""
    for rule in rules:
        if rule.code not in reached:
            error = Result(rule=rule.code, case=spec.id, level=rule.level, status=Status.ERROR, reason=reason)
            yield Judged(result=error, short_of=short_of)
