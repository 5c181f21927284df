"""The largest that fits is confirmed, whatever the sizes look like, and with few steps."""

import pytest

from kbitcheck.observe.forecast.activations import Measured
from kbitcheck.observe.forecast.search import MOST_SEQUENCES, PATIENCE, Largest, Search
from kbitcheck.observe.forecast.storages import Log

GIB = 1 << 30
FEW = 6  # steps for a batch
HALVES = 17  # of the most tokens: what a search among tokens falls back on


class Steps:
    """Counts the steps that a search takes of a model whose peak is a formula."""

    def __init__(self, peak, limit=1 << 17, per_token=0):
        self.shapes = []
        self.peak, self.per_token = peak, per_token
        self.search = Search(self.step, limit)

    def step(self, batch, length, mode):
        self.shapes.append((batch, length))
        log = Log()
        log.events += range(self.per_token * batch * length)
        return Measured(held=0, logits=0, places=[self.peak(batch, length)], log=log)


FORMULAS = {
    "dense": lambda b, n: 10**8 + 2 * 10**6 * b * n,
    "scores": lambda b, n: 10**8 + b * (10**6 * n + 4 * 32 * n**2),
    "window": lambda b, n: b * (10**6 * n + 4 * 32 * n * min(n, 4096)) + 2 * n * min(n, 4096),
    "chunks": lambda b, n: 3 * 10**6 * b * (-(-n // 256) * 256),
    "another kernel": lambda b, n: b * n * (10**5 if n <= 4096 else 10**7),
    "capacity": lambda b, n: 10**6 * b * n + 10**7 * -(-b * n // 1000),
    "two peaks": lambda b, n: max(5 * 10**9 + 10**5 * b * n, 10**6 * b * n),
}


SMOOTH = ("dense", "scores", "window")


@pytest.mark.parametrize("room", [GIB, 16 * GIB, 80 * GIB])
@pytest.mark.parametrize("name", FORMULAS)
def test_what_fits_is_confirmed_by_few_steps(name, room):
    steps = Steps(FORMULAS[name])
    for length in (512, 2048):
        answer, before = steps.search.largest_batch(length, room, "off"), len(steps.shapes)
        assert answer.peak == (steps.peak(answer.number, length) if answer.number else 0) <= room
        assert steps.peak(answer.number + 1, length) > room
        assert (answer.number + 1, length) in steps.shapes
        assert answer.number == 0 or (answer.number, length) in steps.shapes
        assert steps.search.largest_batch(length, room, "off") == answer
        assert len(steps.shapes) == before <= FEW * (1 + (length == 2048))
    taken = len(steps.shapes)
    answer = steps.search.longest(room, "off")
    assert answer.peak <= room
    if answer.limit == "model":
        assert answer.number == 1 << 17
    else:
        assert steps.peak(1, answer.number + 1) > room
        assert (1, answer.number + 1) in steps.shapes
    assert len(steps.shapes) - taken <= (FEW + 1 if name in SMOOTH else HALVES)
    assert len(set(steps.shapes)) == len(steps.shapes)


def test_a_model_takes_no_more_than_its_limit():
    steps = Steps(lambda b, n: b * n, limit=512)
    assert steps.search.longest(GIB, "off") == Largest(number=512, peak=512, limit="model")
    assert steps.search.largest_batch(512, 1 << 60, "off").limit == "model"
    assert (MOST_SEQUENCES, 512) in steps.shapes


def test_a_search_among_steps_that_take_long_ends_with_what_was_confirmed():
    """As of a model whose code loops over tokens: a storage for each, and no kernel for all."""
    steps = Steps(lambda b, n: 10**6 * b * n, per_token=100)
    answer = steps.search.longest(64 * GIB, "off")
    assert answer.limit == "patience"
    assert steps.search.ended_early
    assert (1, answer.number) in steps.shapes
    assert 0 < answer.peak <= 64 * GIB
    assert sum(100 * batch * length for batch, length in steps.shapes) <= PATIENCE
    quick = Steps(lambda b, n: 10**6 * b * n)
    assert quick.search.longest(64 * GIB, "off").number > answer.number
    assert not quick.search.ended_early


def test_where_not_one_fits_there_is_none():
    steps = Steps(lambda b, n: GIB * b * n)
    assert steps.search.largest_batch(4, GIB, "off") == steps.search.longest(-1, "off") == Largest(number=0, peak=0)
