"""What of a case ran on a cut of the model."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """A stack of blocks, by the name of the list that holds them. ``kept`` of its ``total`` blocks are in the cut."""

    name: str
    kept: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CutFacts:
    """The towers of the cut that facts about code paths ran on; without towers, the ``reason`` why they ran on the whole model.

    ``tokens`` says of how many tokens the cut has embeddings and head; empty: of all.
    """

    towers: tuple[Tower, ...] = ()
    tokens: str = ""
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"blocks": str(self), "towers": list(map(asdict, self.towers)), "reason": self.reason}

    def __str__(self) -> str:
        """For example ``2 of 30 blocks``, or ``2 of 24 and 2 of 32 blocks, 4,096 of 32,128 tokens``; empty without a cut."""
        parts = [f"{tower.kept} of {tower.total}" for tower in self.towers]
        return ", ".join(filter(None, (f"{' and '.join(parts)} blocks", self.tokens))) if parts else ""
