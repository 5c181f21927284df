"""What became of a prepared model in several processes, in a trainer, compiled, copied or resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kbitcheck.core.errors import Raised
from kbitcheck.core.facts.step import Distance


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """One process, or one copy of the model, in a composition.

    ``gradients`` are those of the adapters, by name and step, beside those that are expected; ``resembles`` says of one that is wrong
    what it is instead. ``numbers`` are digests of the adapters, by moment and name. ``changed`` are the base's tensors whose bits are
    others after the steps. ``runs`` is how often each block ran in a step, ``reentrant`` how checkpoints were called.
    ``units`` are the dtypes of the floating parameters that one unit of FSDP gathers, those that train first. ``outside``
    are adapters that no unit holds, ``frozen`` those that do not train. ``passes``
    are digests of what each forward and backward of a resumed run began with and left, by what it is, and
    ``saved_behind`` how many of them came before the run was saved.
    ``raised`` is what ended the process, ``ended_by`` the process with which it was ended.
    """

    name: str
    raised: Raised | None = None
    ended_by: str = ""
    gradients: Mapping[str, Distance] = field(default_factory=dict)
    resembles: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    runs: Mapping[str, float] = field(default_factory=dict)
    reentrant: tuple[str, ...] = ()
    units: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    passes: tuple[Mapping[str, str], ...] = ()
    saved_behind: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositionFacts:
    """A composition: ``alone`` is one process without it, beside which the others are judged."""

    kind: str
    alone: ProcessFacts
    processes: tuple[ProcessFacts, ...]
