"""A batch whose shape nobody knows before it is drawn: its rows, its length, its padding, its ignored labels."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.conditions import TURNS, share
from kbitcheck.models.inputs.text import IGNORED, Batch

PADDINGS: Sequence[Literal["right", "left", "none"]] = ("right", "left", "none")
ROWS = (3, 4, 5)  # the case's own batches have two rows and one
SHORT, LONG, LARGE = (65, 193), (513, 577), (65, 67)  # all beyond 64 tokens, and one beyond 512
WHOLE = (128, 192, 576)  # multiples of 64
TEXT = {"input_ids", "attention_mask", "labels"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a batch is like. ``ignored``: of so many labels the first does not count; 0: all of them do.

    ``repeated``: the second row has the tokens of the first. ``silent``: no label of the first row counts.
    """

    rows: int
    length: int
    padding: Literal["right", "left", "none"]
    ignored: int
    repeated: bool = False
    silent: bool = False

    @classmethod
    def drawn(cls, entropy: str, *, limit: int, large: bool, row: int | None = None, seed: int = 0) -> Self:
        """Conditions that depend on ``entropy`` alone; ``limit`` is the most tokens that a model takes.

        A ``large`` model's batch is a short one: what it costs grows with its tokens. The cases of a suite that shares its conditions
        stand in a ``row`` and take turns from ``seed`` on, so that one of three has left padding, and so on.
        """
        generator = random.Random(entropy)  # noqa: S311
        turns, own = [generator.randrange(3) for _ in range(3)], row is None
        if row is not None:  # the models of the first two take so many tokens
            turns = [2 * (row == seed % 2), (row + seed + 1) % 3, (row + seed) % 3]
        long = not large and turns[0] == 2
        low, high = LONG if long else LARGE if large else SHORT
        odd, whole = range(low, high + 1, 2), [n for n in WHOLE if low <= n <= high]
        length = generator.choice(whole if whole and generator.random() < 1 / 4 else odd)
        rows = 1 if long else ROWS[0] if large else generator.choice(ROWS)
        return cls(
            rows=rows,
            length=length if length <= limit else limit - 1 + limit % 2,
            padding=PADDINGS[turns[1]],
            ignored=(0, 2, 3)[turns[2]],
            repeated=rows > 1 and (generator.random() < 1 / 3 if own else row != 2),
            silent=rows > 1 and (generator.random() < 1 / 3 if own else row == 2),
        )

    @classmethod
    def of_case(cls, spec: CaseSpec, *, limit: int, large: bool) -> Self:
        """The conditions of a case; cases that share those of a suite take turns."""
        place = share(spec.conditions)
        if place is None:
            return cls.drawn(spec.entropy, limit=limit, large=large)
        return cls.drawn(spec.entropy, limit=limit, large=large, row=place[0] // TURNS, seed=spec.seed)

    def __str__(self) -> str:
        padding = "no padding" if self.padding == "none" else f"padded on the {self.padding}"
        labels = f", one label of {self.ignored} ignored" if self.ignored else ""
        rows = "one row" if self.rows == 1 else f"{self.rows} rows"
        others = ", two rows alike" * self.repeated + ", no label of one row counts" * self.silent
        return f"{rows} of {self.length} tokens, {padding}{labels}{others}"

    def batch(self, make: Callable[..., Mapping[str, Tensor]]) -> Batch:
        """A batch of ``make(batch=, seq_len=)`` under these conditions; padding and labels only of what reads text alone.

        ``make`` pads the last row of several on the right.
        """
        made = dict(make(batch=self.rows, seq_len=self.length))
        labels = made.get("labels")
        if made.keys() != TEXT or labels is None or labels.shape != made["input_ids"].shape:
            return made
        if self.rows == 1 and self.padding != "none":
            made = {name: tensor[1:] for name, tensor in make(batch=2, seq_len=self.length).items()}
        if self.padding != "right":
            filled = int(made["attention_mask"][-1].sum())
            for tensor in made.values():
                if self.padding == "none":
                    tensor[-1, filled:] = 1 if tensor is made["attention_mask"] else tensor[0, filled:]
                else:
                    tensor[-1] = tensor[-1].roll(tensor.shape[1] - filled, 0)
        if self.repeated:
            for tensor in made.values():
                tensor[1] = tensor[0]
        if self.ignored:
            labels[:, :: self.ignored] = IGNORED
        if self.silent:
            labels[0] = IGNORED
        return made
