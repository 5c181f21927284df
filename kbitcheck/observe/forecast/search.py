"""The largest step that fits, confirmed: a step of that shape was measured and fits, one of the next was and does not."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal

from kbitcheck.observe.forecast.activations import Measured

USUAL = (512, 2048, 4096)
MOST_SEQUENCES = 1 << 20
STRIDE = 8  # a guess beyond what was measured is at most so many times the largest
CLOSE = 0.02
PATIENCE = 500_000  # storages made and freed in the steps of one search: those of a loop over tokens, a minute or two

Step = Callable[[int, int, str], Measured]  # of a batch and a length, under a mode of checkpointing


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest ``number`` of sequences or tokens whose step fits (0: not one), and that step's ``peak`` in bytes.

    ``limit`` is ``memory`` where a step of one more was measured and does not fit, ``model`` where the model takes no more,
    ``patience`` where steps take so long that the search ended before.
    """

    number: int
    peak: int
    limit: Literal["memory", "model", "patience"] = "memory"


class Search:
    """The steps of one model, each shape measured once, and the largest that fit. Sequences have no padding.

    ``step`` measures a step, ``limit`` is the most tokens that the model takes; ``size`` is what has to fit, in bytes.
    """

    def __init__(self, step: Step, limit: int, size: Callable[[Measured], int] = lambda step: step.peak) -> None:
        self.limit = limit
        self._measure, self._size = step, size
        self._measured: dict[tuple[int, int, str], Measured] = {}
        self._patience = PATIENCE
        self.ended_early = False

    @property
    def measured(self) -> tuple[tuple[int, int, str], ...]:
        """Batch, length and mode of every step that was measured."""
        return tuple(self._measured)

    def step(self, batch: int, length: int, mode: str) -> Measured:
        """One step of ``batch`` sequences of ``length`` tokens under a mode of checkpointing."""
        shape = batch, length, mode
        if shape not in self._measured:
            self._measured[shape] = step = self._measure(*shape)
            self._patience -= len(step.log.events)
        return self._measured[shape]

    def within_patience(
        self, shapes: Iterable[tuple[int, int, str]]
    ) -> Iterator[tuple[tuple[int, int, str], Measured]]:
        """The steps of these shapes, as long as patience lasts."""
        self._patience = PATIENCE
        for shape in shapes:
            if self._affords(shape):
                yield shape, self.step(*shape)

    def largest_batch(self, length: int, room: int, mode: str) -> Largest:
        """The most sequences of this length whose step takes at most ``room`` bytes."""
        sizes = {b: self._size(s) for (b, n, m), s in self._measured.items() if (n, m) == (length, mode)}
        return self._largest(sizes, lambda batch: (batch, length, mode), room, MOST_SEQUENCES, start=1, degree=1)

    def longest(self, room: int, mode: str) -> Largest:
        """The longest single sequence whose step takes at most ``room`` bytes."""
        sizes = {n: self._size(s) for (b, n, m), s in self._measured.items() if (b, m) == (1, mode) and n <= self.limit}
        first = self._tokens_of_batches(room, mode)
        return self._largest(sizes, lambda length: (1, length, mode), room, self.limit, start=64, degree=2, first=first)

    def _largest(
        self,
        sizes: Mapping[int, int],
        shape: Callable[[int], tuple[int, int, str]],
        room: int,
        limit: int,
        **guess: int,
    ) -> Largest:
        """As the function, with steps of ``shape`` as long as patience lasts."""

        def measure(number: int) -> int | None:
            return self._size(self.step(*shape(number))) if self._affords(shape(number)) else None

        self._patience = PATIENCE
        largest = _largest(sizes, measure, room, limit, **guess)
        self.ended_early |= largest.limit == "patience"
        return largest

    def _affords(self, shape: tuple[int, int, str]) -> bool:
        """Whether patience is left for a step that makes as many storages for each token as the last one did."""
        if shape in self._measured or not self._measured:
            return True
        (_, length, _), last = next(reversed(self._measured.items()))
        return len(last.log.events) * max(1, shape[1] // length) <= self._patience

    def _tokens_of_batches(self, room: int, mode: str) -> int:
        """About how many tokens in a batch take ``room`` bytes, between batches that were measured; 0 where none tells."""
        sizes = {b * n: self._size(s) for (b, n, m), s in self._measured.items() if m == mode}
        low = max((tokens for tokens, size in sizes.items() if size <= room), default=0)
        high = min((tokens for tokens, size in sizes.items() if tokens > low and size > room), default=0)
        if not low or not high:
            return 0
        return low + (high - low) * (room - sizes[low]) // (sizes[high] - sizes[low])


def _largest(
    sizes: Mapping[int, int],
    measure: Callable[[int], int | None],
    room: int,
    limit: int,
    *,
    start: int,
    degree: int,
    first: int = 0,
) -> Largest:
    """The largest number up to ``limit`` whose bytes fit into ``room``; ``sizes`` are the bytes of those measured already.

    The ``first`` guess may be stated; 0: it is not. Others follow a polynomial through the nearest numbers, and halve what
    is left wherever it was wrong the last time. A negative room needs no step. The search ends where ``measure`` gives None.
    """
    if room < 0:
        return Largest(number=0, peak=0)
    sizes = {0: 0, **sizes}
    low = max((n for n, size in sizes.items() if size <= room), default=0)
    high = min((n for n, size in sizes.items() if n > low and size > room), default=limit + 1)
    trusted = True
    while high - low > 1:
        # Code that loops over tokens takes as long as there are: no guess goes far beyond what was measured.
        end = min(high, STRIDE * max(low, start) + 1)
        nodes = sorted(sizes, key=lambda n: min(abs(n - low), abs(n - end)))[: degree + 1]
        size = partial(_through, {n: sizes[n] for n in nodes})
        first_above = low + 1 + bisect_left(range(low + 1, end), True, key=lambda number: size(number) > room)
        guess = max(first_above - 1, low + 1) if trusted else (low + end) // 2
        if low < first < end:
            guess = first
        measured = measure(guess)
        if measured is None:
            return Largest(number=low, peak=sizes[low], limit="patience")
        sizes[guess] = measured
        trusted = guess == first or len(sizes) < 4 or abs(size(guess) - sizes[guess]) < CLOSE * sizes[guess]
        first = 0
        low, high = (guess, high) if sizes[guess] <= room else (low, guess)
    return Largest(number=low, peak=sizes[low], limit="model" if low == limit else "memory")


def _through(points: Mapping[int, int], number: int) -> float:
    """The value at ``number`` of the polynomial through the points."""
    return sum(size * prod((number - m) / (n - m) for m in points if m != n) for n, size in points.items())
