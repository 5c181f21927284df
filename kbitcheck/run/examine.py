"""The events of one case, in whatever process it is judged. No torch here."""

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.events import Event, Figures, Judged
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import Rule, judge


def examine(case: Any, rules: Sequence[Rule], *, device: str = "cpu") -> Iterator[Event]:
    """A ``Judged`` for each rule and the case's ``Figures``; closes the case.

    An ERROR is fatal where it may leave the process in a state that the next case would suffer from: memory ran out, or
    the case runs on an accelerator.
    """
    with contextlib.closing(case):
        for rule in rules:
            raised: list[Exception] = []
            result = judge(rule, case, on_error=raised.append)
            out_of_memory = any(isinstance(error, MemoryError) for error in raised)
            yield Judged(result=result, fatal=result.status is Status.ERROR and (out_of_memory or device != "cpu"))
        yield Figures(case=case.case, facts=case.summary())


def not_reached(spec: CaseSpec, rules: Sequence[Rule], reached: Container[str], reason: str) -> Iterator[Judged]:
    """An ERROR for every rule that the case did not reach."""
    for rule in rules:
        if rule.code not in reached:
            error = Result(rule=rule.code, case=spec.id, level=rule.level, status=Status.ERROR, reason=reason)
            yield Judged(result=error)
