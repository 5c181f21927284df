"""How a step's peak grows with batch and length, and the largest step that fits."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

USUAL = (512, 2048, 4096)
LARGEST = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Growth:
    """The peak of a step by batch and length: the largest of many polynomials, as the largest place depends on the shape.

    A row of ``places`` is the bytes alive when one storage was made, as float64 coefficients of 1, length, length²,
    batch, batch length and batch length². Masks have no batch, scores length², images no length.
    """

    places: Tensor

    @classmethod
    def through(cls, length: int, measured: Mapping[tuple[int, int], Sequence[int]]) -> Self:
        """The growth through the bytes alive at each place, by (batch, length), for the six ``shapes(length)``.

        If shapes make different numbers of storages, their peaks alone are compared.
        """
        wanted = shapes(length)
        rows = [measured[shape] for shape in wanted]
        if len({len(row) for row in rows}) > 1:
            rows = [[max(row)] for row in rows]
        # Lengths are scaled to one: powers of thousands would spend the digits of a float64.
        system = torch.stack([_terms(batch, at / length) for batch, at in wanted])
        scale = torch.tensor([1, length, length**2] * 2, dtype=torch.float64)
        return cls(torch.linalg.solve(system, torch.tensor(rows, dtype=torch.float64)).T / scale)

    def peak(self, batch: int, length: int) -> float:
        """Bytes of one step."""
        return float((self.places @ _terms(batch, length)).max())

    def largest_batch(self, length: int, room: int) -> int:
        """The most sequences of this length whose step takes at most ``room`` bytes; 0 where not one does."""
        return bisect_left(range(1, LARGEST + 1), True, key=lambda batch: self.peak(batch, length) > room)

    def longest(self, room: int, limit: int) -> int:
        """The longest single sequence, of at most ``limit`` tokens, whose step takes at most ``room`` bytes."""
        return bisect_left(range(1, limit + 1), True, key=lambda length: self.peak(1, length) > room)


def shapes(length: int) -> tuple[tuple[int, int], ...]:
    """The shapes, (batch, length), to measure for the growth around a length; a single sequence takes other operators."""
    return tuple((batch, at) for batch in (2, 3) for at in (max(length // 2, 1), length, 2 * length))


def _terms(batch: int, length: float) -> Tensor:
    alone = torch.tensor([1, length, length**2], dtype=torch.float64)
    return torch.cat([alone, batch * alone])
