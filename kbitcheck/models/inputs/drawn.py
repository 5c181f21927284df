"""A batch whose shape nobody knows before it is drawn: its rows, its length, its padding, its ignored labels."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

from kbitcheck.models.inputs.text import IGNORED, Batch

ROWS = (3, 4, 5)  # the case's own batches have two rows and one
SHORT, LONG, LARGE = (65, 193), (513, 577), (65, 73)  # all beyond 64 tokens, and one beyond 512
TEXT = {"input_ids", "attention_mask", "labels"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a batch is like. ``ignored``: of so many labels the first does not count; 0: all of them do."""

    rows: int
    length: int
    padding: Literal["right", "left", "none"]
    ignored: int

    @classmethod
    def drawn(cls, entropy: str, *, limit: int, large: bool) -> Self:
        """Conditions that depend on ``entropy`` alone; ``limit`` is the most tokens that a model takes.

        A ``large`` model's batch is a short one: what it costs grows with its tokens.
        """
        generator = random.Random(entropy)  # noqa: S311
        long = not large and generator.random() < 1 / 3
        low, high = LONG if long else LARGE if large else SHORT
        return cls(
            rows=1 if long else ROWS[0] if large else generator.choice(ROWS),
            length=min(generator.randrange(low, high + 1, 2), limit),
            padding=generator.choice(("right", "left", "none")),
            ignored=generator.choice((0, 2, 3)),
        )

    def __str__(self) -> str:
        padding = "no padding" if self.padding == "none" else f"padded on the {self.padding}"
        labels = f", one label of {self.ignored} ignored" if self.ignored else ""
        return f"{self.rows} rows of {self.length} tokens, {padding}{labels}"

    def batch(self, make: Callable[..., Mapping[str, Tensor]]) -> Batch:
        """A batch of ``make(batch=, seq_len=)`` under these conditions; padding and labels only of what reads text alone.

        ``make`` pads the last row on the right.
        """
        made = dict(make(batch=self.rows, seq_len=self.length))
        labels = made.get("labels")
        if made.keys() != TEXT or labels is None or labels.shape != made["input_ids"].shape:
            return made
        if self.padding != "right":
            filled = int(made["attention_mask"][-1].sum())
            for tensor in made.values():
                if self.padding == "none":
                    tensor[-1, filled:] = 1 if tensor is made["attention_mask"] else tensor[0, filled:]
                else:
                    tensor[-1] = tensor[-1].roll(tensor.shape[1] - filled, 0)
        if self.ignored:
            labels[:, :: self.ignored] = IGNORED
        return made
