"""How a caller trains a model: what the checks that run or watch real steps have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a caller trains a model.

    ``batch`` has the keyword arguments of a forward (None: one is drawn). ``loss`` makes the loss of what the forward
    returns (None: the model's own, or one that is drawn). ``trains`` names what trains beside adapters: each a whole part of
    a parameter's dotted path, or several in a row, as ``v_head`` and ``v_head.summary`` are. ``optimizer`` takes the steps
    (None: whichever does; where none does, AdamW is assumed at ``rate``, or at the default of the trainer whose recipe the
    model follows). ``steps`` is the number of optimizer steps that are looked at.
    """

    batch: Mapping[str, Any] | None = None
    loss: Callable[[Any], Any] | None = None
    trains: Sequence[str] = ()
    optimizer: Any = None
    rate: float | None = None
    steps: int = STEPS

    def names(self, parameter: str) -> bool:
        """Whether ``trains`` names the parameter of this dotted path."""
        return any(f".{name}." in f".{parameter}." for name in self.trains)
