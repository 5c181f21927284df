"""Bytes: what steps hold, what preparing costs, what training is predicted to take."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from kbitcheck.core import memory_sizes
from kbitcheck.core.facts.fit import AnswerFacts, CellFacts, CurveFacts, LoadingFacts, PartFacts, ShareFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """Activation bytes alive between forward and backward, each storage once, whatever holds it.

    ``allowed`` is what checkpointing has to keep, from the plain run: the blocks' tensor arguments and results and all
    that was made outside the blocks. ``stack`` is what a bare quantized layer demonstrably keeps under checkpointing.
    ``steps`` are the bytes each block added in the checkpointed forward, ``step_allowed`` those of its inputs,
    ``plain_steps`` what it added in the plain one.
    """

    plain: int
    held: int
    allowed: int
    stack: int
    blocks: int
    peak: int
    steps: Mapping[str, int]
    step_allowed: Mapping[str, int]
    step_stack: Mapping[str, int]
    survivors: int
    plain_steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFacts:
    """Bytes while preparing, parameters and buffers included, counted as storages alive.

    ``cached`` is what emptying the accelerator's cache gave back afterwards; None on a CPU.
    """

    before: int
    after: int
    peak: int
    largest: int
    stale: int
    cached: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts:
    """Parameters and bytes of one part of a quantized model. ``quantized`` of its ``parameters`` are packed.

    ``packed`` and ``state`` are the bytes of packed weights and of their quantization states, ``unquantized`` those of
    all other parameters as loaded; ``upcast`` maps a profile to the bytes it adds to them.
    """

    parameters: int = 0
    quantized: int = 0
    packed: int = 0
    state: int = 0
    unquantized: int = 0
    buffers: int = 0
    upcast: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Self) -> Self:
        names = ("parameters", "quantized", "packed", "state", "unquantized", "buffers")
        numbers = {name: getattr(self, name) + getattr(other, name) for name in names}
        return type(self)(**numbers, upcast=dict(Counter(self.upcast) + Counter(other.upcast)))

    @property
    def nbytes(self) -> int:
        """Bytes as loaded."""
        return self.packed + self.state + self.unquantized + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFacts:
    """Bytes of activations: ``held`` between forward and backward, ``peak`` the most at any time, gradients included."""

    held: int
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastFacts:
    """What training will take, in bytes, predicted without weights, with the ``chosen`` optimizer.

    ``optimizer`` maps an optimizer to what it keeps on the device; ``activations`` maps a checkpointing mode to a step
    of ``batch`` sequences of ``seq_len`` tokens, by the kernels of ``device``, under ``autocast`` (a dtype, or ``none``).
    ``compared`` is the same step under ``mode`` without autocast, or under the one of ``Trainer(bf16=True)`` if it is off,
    and ``attention`` counts the layers that take each kernel: both by autocast. ``largest_batch`` (at ``seq_len``; at
    other lengths in ``usual``) and ``longest`` (one sequence, in tokens), all without padding, map memory sizes in
    bytes, named in ``rooms``, to what fits beside ``overhead`` under ``mode``, confirmed by predicted steps: one of that shape
    fits, one more row or token does not, or is above ``limit``, the most tokens that the model takes. They are empty
    where the step takes less than 1 % of any memory and none was requested.
    ``parts`` are the bytes alive at the peak under ``mode``, which they sum to; ``reserved`` is what CUDA's allocator takes
    from the device for that step, 0 where it was not simulated. ``cells`` are steps of usual shapes under ``mode`` beside
    the requested memory, and ``curve`` is the step from beginning to end. ``missing`` is why no step was predicted.
    """

    groups: Mapping[str, GroupFacts]
    profile: str
    adapters: int
    trainable: int
    optimizer: Mapping[str, int]
    device: str
    mode: str
    memory: int | None = None
    batch: int = 0
    seq_len: int = 0
    limit: int = 0
    activations: Mapping[str, HeldFacts] = field(default_factory=dict)
    logits: int = 0
    autocast: str = "none"
    compared: Mapping[str, HeldFacts] = field(default_factory=dict)
    attention: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    largest_batch: Mapping[int, int] = field(default_factory=dict)
    longest: Mapping[int, int] = field(default_factory=dict)
    usual: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    rooms: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing: str = ""
    chosen: str = "adamw"
    accumulate: int = 1
    loading: LoadingFacts | None = None
    parts: tuple[PartFacts, ...] = ()
    reserved: int = 0
    answer: AnswerFacts | None = None
    cells: tuple[CellFacts, ...] = ()
    curve: CurveFacts | None = None
    gpus: int = 1
    shares: tuple[ShareFacts, ...] = ()

    @property
    def loaded(self) -> int:
        """Bytes of the quantized model as loaded."""
        return sum(g.nbytes for g in self.groups.values())

    @property
    def upcast(self) -> int:
        """Bytes that the case's profile adds."""
        return sum(g.upcast.get(self.profile, 0) for g in self.groups.values())

    @property
    def parameters(self) -> int:
        """Number of parameters, each storage once."""
        return sum(g.parameters for g in self.groups.values())

    @property
    def resident(self) -> int:
        """Bytes that stay through training: prepared weights, adapters and the state of the ``chosen`` optimizer."""
        return self.loaded + self.upcast + self.adapters + self.optimizer[self.chosen]

    @property
    def overhead(self) -> int:
        """An estimate of what a CUDA device holds beside tensors: its context, and the workspaces of cuBLAS."""
        return 0 if self.device == "cpu" else memory_sizes.CUDA_CONTEXT + memory_sizes.CUBLAS_WORKSPACE

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary, sums included."""
        sums = {name: getattr(self, name) for name in ("loaded", "upcast", "parameters", "resident", "overhead")}
        totals = {mode: self.total(mode) for mode in self.activations}
        plain = json.loads(json.dumps(asdict(self)))  # sizes, the keys of some fields, become text
        return {**plain, **sums, "gradients": self.adapters, "total": totals}

    def total(self, mode: str) -> int | None:
        """Peak of a training step under a checkpointing mode; the gradients are in it."""
        step = self.activations.get(mode)
        return None if step is None else self.resident + max(step.peak, self.adapters)
