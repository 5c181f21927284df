"""What probes see, as plain data: frozen, torch-free, comparable. Sizes are in bytes, dtypes are torch's names ("float32").

A digest is a hexadecimal hash; equal digests mean equal bits (``bits``) or equal numbers (``value``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

HALF = frozenset({"float16", "bfloat16"})
FLOATING = HALF | {"float32", "float64"}


class Unavailable(Exception):
    """A fact that this case cannot give, with the reason; a rule that reads it becomes an ERROR."""


CANNOT_RUN = "the prepared model does not run (KB210): "  # before what it raises, where a rule would have to run it


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """One parameter or buffer. ``storage`` numbers the memory it lives in: equal numbers share it.

    ``value`` hashes the numbers as float64, whatever the dtype (None for packed weights and for what is not floating).
    """

    name: str
    cls: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    requires_grad: bool
    storage: int
    nbytes: int
    bits: str
    value: str | None = None
    packed: bool = False
    adapter: bool = False
    quantized_bias: bool = False
    has_grad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One quantized layer, found by type and quantization state. ``state`` maps each field of the state to a digest."""

    name: str
    cls: str
    kind: str
    in_features: int
    out_features: int
    compute: str
    state: Mapping[str, str]
    dequantized: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """One module. ``checkpointing`` is its flag (None where it has none); ``norm`` is what makes it look like a norm.

    ``numbers`` are the plain numbers that it keeps: an epsilon, a scale, a dropout rate.
    """

    name: str
    cls: str
    training: bool
    checkpointing: bool | None
    hooks: tuple[str, ...]
    norm: frozenset[str] = frozenset()
    block: bool = False
    tower: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model at one stage: loaded, prepared, wrapped or stepped."""

    cls: str
    parameters: Mapping[str, TensorFacts]
    buffers: Mapping[str, TensorFacts]
    layers: Mapping[str, LayerFacts]
    modules: Mapping[str, ModuleFacts]
    config: Mapping[str, Any]
    state_keys: frozenset[str]
    input_hooks: Mapping[str, int]
    can_checkpoint: bool
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def blocks(self) -> list[ModuleFacts]:
        """The modules that transformers checkpoints one by one."""
        return [m for m in self.modules.values() if m.block]

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and buffers, each storage once."""
        tensors = [*self.parameters.values(), *self.buffers.values()]
        return sum({t.storage: t.nbytes for t in tensors}.values())

    def ties(self) -> set[frozenset[str]]:
        """Groups of parameter names that share memory."""
        groups: dict[int, set[str]] = {}
        for tensor in self.parameters.values():
            groups.setdefault(tensor.storage, set()).add(tensor.name)
        return {frozenset(g) for g in groups.values() if len(g) > 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFacts:
    """One call of an implementation. ``raised`` is ``Type: message`` or empty, ``raised_at`` the file and line.

    ``class_kept`` is whether the model is of the very class it was, ``checkpoints`` whether any block's flag is on after
    the call, ``modes_changed`` the modules whose train or eval mode is another. ``process`` maps what changed in the
    process (a seed, a default, a class attribute) to ``(before, after)``; ``parameters`` maps the signature's names to
    the text of their defaults ("" where there is none).
    """

    raised: str = ""
    raised_at: str = ""
    same_object: bool = True
    returned: str = ""
    warnings: tuple[str, ...] = ()
    kwargs_before: str = ""
    kwargs_after: str = ""
    class_kept: bool = True
    checkpoints: bool = False
    modes_changed: tuple[str, ...] = ()
    process: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    parameters: Mapping[str, str] | None = None
    accepts_any: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """One block in one training step. ``computed`` and ``recomputed`` count runs of its inside before and in backward.

    ``without_grad`` counts entries while gradients are off: the model's own doing in a plain run.
    """

    name: str
    tower: str
    computed: int
    recomputed: int
    on_path: bool
    input_requires_grad: bool | None
    without_grad: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One training forward and backward. ``grads`` maps adapter names to their gradients' digests (None: no gradient).

    ``checkpoints`` holds the arguments that reached torch's checkpoint, one mapping a call; ``order`` is the order in
    which blocks were recomputed; ``inexact`` are blocks that checkpointed round otherwise.
    """

    loss: float
    loss_bits: str
    grads: Mapping[str, str | None]
    blocks: Mapping[str, BlockFacts] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    checkpoints: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    cache_held: bool | None = None
    inexact: tuple[str, ...] = ()
    base_grads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a tensor is from another: relative Frobenius norm, beside the bound's yardstick (same unit)."""

    equal: bool
    relative: float
    yardstick: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientFacts:
    """One adapter's gradient against the float64 twin's. ``live`` is the twin's word; norms are Frobenius norms."""

    live: bool
    norm: float | None
    finite: bool
    twin_norm: float
    error: float
    noise: float
    yardstick: float
    bitwise: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBackward:
    """A quantized layer's own backward.

    ``excess`` is the largest elementwise error over its bound (1 is the limit); ``gain`` is the least-squares factor
    between the gradient found and the one expected, and ``gain_bound`` how far from 1 rounding can move it. ``misread``
    is how far the backend's own kernel unpacks the weight from what its format says, relative, where that is more than
    rounding: the layer is then judged by the kernel's weight. ``bent`` is how far a gradient thousands of times as large
    comes out from as many times as large, relative, and ``overflows`` whether one that is not finite stays so.
    """

    reached: bool
    carried: bool
    excess: float = 0.0
    gain: float = 1.0
    gain_bound: float = 0.0
    misread: float = 0.0
    bent: float = 0.0
    bent_bound: float = 0.0
    overflows: bool = True


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
    peak_plain: int
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
class ForwardFacts:
    """One forward under one condition. ``raised`` is ``Type: message`` or empty; ``base_raised`` the unprepared base's.

    ``apart`` is how far the logits are from the base's under the same condition, relative (root mean squares), and
    ``base_step`` how far the base's own are in eval from what they are in train, without dropout; ``base_cast`` how far
    they are under autocast from what they are without. ``wide_raised`` is what the same model raises there where every
    parameter and buffer is float32 and nothing is quantized; asked only where this one raised and the base did not.
    """

    condition: str
    autocast: bool
    finite: bool
    raised: str = ""
    base_raised: str = ""
    base_finite: bool = True
    apart: float | None = None
    base_step: float = 0.0
    base_cast: float = 0.0
    wide_raised: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionFacts:
    """Logits before adapters, relative to the float64 twin's (root mean square of the difference over that of the twin)."""

    base_error: float
    error: float
    twin_error: float
    ulp: float
    left_out: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """One step of a program: what it raised, and which quantized layers hold other bits than before the program.

    ``gradients`` are a training step's beside those of a fresh model with the same adapters; empty for other steps.
    ``checkpoints`` counts the calls of torch's checkpoint in both.
    """

    step: str
    raised: str
    changed: tuple[str, ...]
    hooks_added: int
    gradients: Mapping[str, Distance]
    checkpoints: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """A few AdamW steps with weight decay on one batch: losses before each step and after the last; what changed."""

    losses: tuple[float, ...]
    twin_losses: tuple[float, ...]
    changed: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """Save and reload of the prepared model and of its adapters, neither of which ever ran."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    raised: str
    logits: Distance | None


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

    def __add__(self, other: GroupFacts) -> GroupFacts:
        names = ("parameters", "quantized", "packed", "state", "unquantized", "buffers")
        profiles = dict.fromkeys((*self.upcast, *other.upcast))
        return GroupFacts(
            **{n: getattr(self, n) + getattr(other, n) for n in names},
            upcast={p: self.upcast.get(p, 0) + other.upcast.get(p, 0) for p in profiles},
        )

    @property
    def nbytes(self) -> int:
        """Bytes as loaded."""
        return self.packed + self.state + self.unquantized + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFacts:
    """Bytes of activations: ``held`` between forward and backward, ``peak`` the most at any time."""

    held: int
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastFacts:
    """What training will take, in bytes, predicted without weights.

    ``optimizer`` maps an optimizer to what it keeps on the device; ``activations`` maps a checkpointing mode to a step
    of ``batch`` sequences of ``seq_len`` tokens, by the kernels of ``device``. ``largest_batch`` (at ``seq_len``; at
    other lengths in ``usual``) and ``longest`` (one sequence, in tokens), all without padding, map memory sizes in
    bytes, named in ``rooms``, to what fits with 32-bit AdamW under ``mode``; they are empty where the step takes less than
    1 % of any and no memory was given.
    ``missing`` is why no step was predicted.
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
    activations: Mapping[str, HeldFacts] = field(default_factory=dict)
    logits: int = 0
    largest_batch: Mapping[int, int] = field(default_factory=dict)
    longest: Mapping[int, int] = field(default_factory=dict)
    usual: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    rooms: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing: str = ""

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
        """Bytes that stay through training: prepared weights, adapters and the state of 32-bit AdamW."""
        return self.loaded + self.upcast + self.adapters + self.optimizer["adamw"]

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary, sums included."""
        sums = {name: getattr(self, name) for name in ("loaded", "upcast", "parameters", "resident")}
        totals = {mode: self.total(mode) for mode in self.activations}
        plain = asdict(self)
        for name in ("largest_batch", "longest"):
            plain[name] = {str(size): number for size, number in plain[name].items()}
        rooms = {str(size): name for size, name in self.rooms.items()}
        plain["usual"] = {str(at): {str(size): n for size, n in row.items()} for at, row in self.usual.items()}
        return {**plain, **sums, "gradients": self.adapters, "total": totals, "rooms": rooms}

    def total(self, mode: str) -> int | None:
        """Peak of a training step under a checkpointing mode; the gradients are in it."""
        step = self.activations.get(mode)
        return None if step is None else self.resident + max(step.peak, self.adapters)


class Facts(Protocol):
    """What rules read: one case's facts, each computed when first read and then kept."""

    @property
    def case(self) -> str: ...
    @property
    def profile(self) -> str: ...
    @property
    def freezes(self) -> str: ...
    @property
    def checkpointing(self) -> str: ...
    @property
    def live(self) -> bool:
        """Whether the subject is a model someone else prepared: nothing before it is known."""
        ...

    @property
    def compute_ulp(self) -> float: ...
    @property
    def half_ulp(self) -> float:
        """That of what autocast runs in."""
        ...

    @property
    def base(self) -> ModelFacts: ...
    @property
    def call(self) -> CallFacts: ...
    @property
    def prepared(self) -> ModelFacts: ...
    @property
    def wrapped(self) -> ModelFacts: ...
    @property
    def trained(self) -> ModelFacts: ...
    @property
    def rounded_biases(self) -> Mapping[str, str]:
        """Bits of each quantized layer's bias, rounded once to the dtype the layer computes in."""
        ...

    @property
    def training_flags(self) -> Mapping[str, bool]: ...
    @property
    def plain_run(self) -> RunFacts: ...
    @property
    def run(self) -> RunFacts: ...
    @property
    def step_raised(self) -> str:
        """What the training step of ``run`` raised, as ``Type: message``; empty where it ran."""
        ...

    @property
    def other_mode_raised(self) -> str:
        """What a training step raised after the checkpointing mode was switched; empty if nothing."""
        ...

    @property
    def unprepared(self) -> Facts:
        """The same case of a base that transformers alone checkpoints and nothing prepares: a witness."""
        ...

    @property
    def bare(self) -> Facts:
        """The same case of a base that is cast as the profile promises, and not prepared or checkpointed: a witness."""
        ...

    @property
    def gradients(self) -> Mapping[str, GradientFacts]: ...
    @property
    def single_gradients(self) -> Mapping[str, GradientFacts]:
        """Those of a step on one row without a mask."""
        ...

    @property
    def against_plain(self) -> Mapping[str, Distance]: ...
    @property
    def against_other_mode(self) -> Mapping[str, Distance]: ...
    @property
    def against_plain_dropout(self) -> Mapping[str, Distance]: ...
    @property
    def layer_backwards(self) -> Mapping[str, LayerBackward]: ...
    @property
    def memory(self) -> MemoryFacts: ...
    @property
    def cost(self) -> CostFacts: ...
    @property
    def forwards(self) -> Sequence[ForwardFacts]: ...
    @property
    def left_by_evaluation(self) -> int:
        """Bytes that stay alive after a forward in eval mode."""
        ...

    @property
    def function(self) -> FunctionFacts: ...
    @property
    def training(self) -> TrainingFacts: ...
    @property
    def store(self) -> StoreFacts: ...
    @property
    def interleaved(self) -> Sequence[StepOutcome]: ...
    @property
    def generator(self) -> bool:
        """Whether the unprepared model can generate."""
        ...

    @property
    def generates(self) -> ForwardFacts: ...
    @property
    def default_call(self) -> CallFacts: ...
    @property
    def positional_call(self) -> CallFacts: ...
    @property
    def repeated(self) -> ModelFacts: ...
    @property
    def prepared_again(self) -> ModelFacts: ...
    @property
    def switched_off(self) -> ModelFacts: ...
    @property
    def refused(self) -> tuple[CallFacts, ModelFacts, ModelFacts]: ...
    @property
    def adapters_first(self) -> tuple[CallFacts, frozenset[str], frozenset[str]]: ...
    @property
    def honoured(self) -> tuple[Mapping[str, str], RunFacts, CallFacts]: ...
    @property
    def repeated_run(self) -> RunFacts: ...
    @property
    def remote_code(self) -> bool: ...
    @property
    def unfit_targets(self) -> Mapping[str, str]: ...
    @property
    def forecast(self) -> ForecastFacts: ...
    @property
    def widened(self) -> Mapping[str, int]:
        """Bytes that preparation adds to each half-precision parameter that it widens."""
        ...
