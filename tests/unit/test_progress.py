"""Lines that say how far a run is, where stderr is no terminal: now and then, and not under ``--quiet``."""

from __future__ import annotations

import io
import re
import sys

import pytest

from kbitcheck.cli.console import progress
from kbitcheck.core import pace
from kbitcheck.core.events import Computing, Event, Judged, Started
from kbitcheck.core.result import Status
from tests.ledger.reports import INT8, NF4, result


class Clock:
    """A clock that goes on by ten seconds whenever a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(pace, "time", ticking)
    return ticking


def judged(case: str) -> Judged:
    return Judged(result=result("KB101", case, Status.PASS))


def lines(
    clock: Clock, capfd: pytest.CaptureFixture[str], events: list[Event], *how: int | None, quiet: bool = False
) -> list[str]:
    """What is written on events that come every ten seconds."""
    with progress(*how, quiet=quiet) as take:
        for event in events:
            clock.now += 10
            take(event)
    return capfd.readouterr().err.splitlines()


TWO_CASES: list[Event] = [
    *(Started(case=NF4), Computing(case=NF4, fact="outputs", left=3.0), judged(NF4), judged(NF4)),
    *(Started(case=INT8), judged(INT8), judged(INT8), judged(INT8)),
]


def test_a_run_says_now_and_then_which_case_it_is_at_and_how_long_the_rest_takes(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lines(clock, capfd, TWO_CASES, 6, 2) == [
        f"case 1 of 2, {NF4}: 30 s so far, about 2 min left",
        f"case 2 of 2, {INT8}: 60 s so far, about 60 s left",
    ]


def test_one_case_says_what_is_predicted_of_it(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    events = [Started(case=NF4), judged(NF4), Computing(case=NF4, fact="outputs", left=240.0)]
    assert lines(clock, capfd, events, 6, 1) == [f"case 1 of 1, {NF4}: 30 s so far, about 4 min left"]


def test_cases_that_nobody_counts_have_no_end(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    cases: list[Event] = [Started(case=NF4)] * 3
    assert lines(clock, capfd, cases, None, None) == [f"case 3, {NF4}: 30 s so far"]
    assert lines(clock, capfd, cases, None, 4) == [f"case 3 of 4, {NF4}: 30 s so far, about 30 s left"]


def test_quiet_runs_and_short_ones_say_nothing(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    assert lines(clock, capfd, TWO_CASES, 6, 2, quiet=True) == []
    assert lines(clock, capfd, TWO_CASES[:2], 6, 2) == []


@pytest.mark.parametrize(("results", "shown"), [(6, "3/6"), (None, "1/2")])
def test_a_terminal_has_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch, results: int | None, shown: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress(results, 2) as take:
        for event in TWO_CASES[:-2]:
            take(event)
    drawn = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert f"{shown} {INT8}" in drawn
