"""Forwards and training steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kbitcheck.core.errors import Raised
from kbitcheck.core.facts.blockwise import BlockwiseFacts
from kbitcheck.core.facts.model import CallFacts, Changes
from kbitcheck.core.facts.rounding import FLOAT32_ULP

CANNOT_RUN = "the prepared model does not run (KB210): "  # before what it raises, where a rule would have to run it


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
class RouterFacts:
    """A router in a checkpointed step: its tokens, those whose experts the recompute changed, and those with a near tie.

    A near tie is between the last expert that is picked and the first that is not: no further apart than one ulp of the scores.
    """

    tokens: int
    changed: int
    near_ties: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One training forward and backward. ``order`` is the order in which blocks were recomputed.

    ``checkpoints`` holds the arguments that reached torch's checkpoint, one mapping a call; ``inexact`` are blocks whose
    gradients may differ in the last bits when checkpointed; ``buffers`` has the digest of each that the step changed;
    ``routers`` are those that ran twice. ``held`` are the bytes that are held of each block's inside between forward and backward, and
    the bytes that the modules in it returned.
    """

    loss: float
    loss_bits: str
    blocks: Mapping[str, BlockFacts] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    checkpoints: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    cache_held: bool | None = None
    inexact: tuple[str, ...] = ()
    base_grads: tuple[str, ...] = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    routers: Mapping[str, RouterFacts] = field(default_factory=dict)
    held: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a tensor is from another: relative Frobenius norm, beside the bound's yardstick (same unit)."""

    equal: bool
    relative: float
    yardstick: float = 0.0

    @property
    def bound(self) -> float:
        """The yardstick; at least one ulp of float32, in which adapters live."""
        return max(self.yardstick, FLOAT32_ULP)


@dataclass(frozen=True, slots=True, kw_only=True)
class MisreadLayout:
    """An input and a gradient, ``what`` they are, that a layer reads as other numbers or raises on, and ``actual``, what it does.

    ``bare`` says that the library's own layer on the same weight, without hooks or another forward, does so too.
    """

    what: str
    actual: str
    bare: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBackward:
    """A quantized layer's own backward.

    ``excess`` is the largest elementwise error over its bound (1 is the limit); ``gain`` is the least-squares factor
    between the measured gradient and the expected one, and ``gain_bound`` how far from 1 rounding can move it. ``misread``
    is how far the backend's own kernel unpacks the weight from what its format says, relative, where that is more than
    rounding: the layer is then judged by the kernel's weight. ``bent`` is how far a gradient thousands of times as large
    comes out from as many times as large, relative, and ``overflows`` whether one that is not finite stays so. ``unjudged``
    is why the layer could not be judged, empty where it was. ``layouts`` are those of inputs and gradients that it misreads.
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
    unjudged: str = ""
    layouts: tuple[MisreadLayout, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFacts:
    """One forward under one condition. ``raised`` is what it raised, ``base_raised`` what the unprepared base did.

    ``apart`` is how far the logits are from the base's under the same condition, relative (root mean squares), and
    ``base_step`` how far the base's own are in eval from what they are in train, without dropout; ``base_cast`` how far
    they are under autocast from what they are without. ``wide_raised`` is what the same model raises there where every
    parameter and buffer is float32 and nothing is quantized; None unless this one raised and the base did not.
    """

    condition: str
    autocast: bool
    finite: bool
    raised: Raised | None = None
    base_raised: Raised | None = None
    base_finite: bool = True
    apart: float | None = None
    base_step: float = 0.0
    base_cast: float = 0.0
    wide_raised: Raised | None = None


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
class StartFacts:
    """How far adapters that have not trained move the prepared model's logits, relative to those without adapters.

    ``left_out`` of the ``tokens`` are routed to other experts.
    """

    apart: float
    left_out: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """One step of a program: what it raised, and which quantized layers hold other bits than before the program.

    ``gradients`` are a training step's beside those of a fresh model with the same adapters; empty for other steps.
    ``checkpoints`` counts the calls of torch's checkpoint in both. ``unsteady`` is what a library does in it on this machine that is
    switched off in other programs; "" in these.
    """

    step: str
    raised: Raised | None
    changed: tuple[str, ...]
    hooks_added: int
    gradients: Mapping[str, Distance]
    checkpoints: tuple[int, int] = (0, 0)
    unsteady: str = ""


CERTAIN = 1 / 24  # the uncertainty that is wanted of a slope
WIDEST = 1 / 2  # bound of a slope from which anything follows


def slope_bound(uncertainty: float) -> float:
    """How far the slope of a descent may be from 1: a quarter, or six times its uncertainty if that is more."""
    return 6 * max(uncertainty, CERTAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """Two AdamW steps with weight decay on one batch: the loss before the first and on its way.

    ``predicted`` has, for each of the ``losses``, the change that the gradient times the change of the parameters
    predicts. The loss changes by ``slope`` times the prediction, plus a second-order term; ``uncertainty`` is that of the slope,
    from rounding and from terms of higher order.
    """

    losses: tuple[float, ...]
    predicted: tuple[float, ...]
    slope: float
    uncertainty: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterFacts:
    """Steps that a model takes with an optimizer: at each look, by adapter, how far its gradient is from that of the first step.

    ``checkpoints`` are the calls of torch's checkpoint in the first step and at each look, ``kept`` the bytes alive after all of them of
    what modules returned, and ``effects`` what changed in the process meanwhile.
    """

    looks: Mapping[str, Mapping[str, Distance]]
    checkpoints: Mapping[str, int] = field(default_factory=dict)
    kept: int = 0
    effects: Changes = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnFacts:
    """A step of a batch that is drawn: what the batch is like, and the plain step block by block.

    Of the step with checkpointing there are the distance of each adapter's gradient from the plain step's, and the calls of torch's
    checkpoint, beside those of the case's own batch; none where checkpointing is off.
    """

    conditions: str
    blockwise: BlockwiseFacts
    against_plain: Mapping[str, Distance] = field(default_factory=dict)
    checkpoints: int | None = None
    usual_checkpoints: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """Save and reload of the prepared model and of its adapters, neither of which ever ran.

    ``effects`` are those of saving the prepared model.

    If neither the prepared model nor the unprepared base can be saved and loaded, ``base_raised`` says why, and the
    adapters alone are saved, and loaded into another prepared base.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    raised: Raised | None = None
    base_raised: Raised | None = None
    logits: Distance | None = None
    effects: Changes


@dataclass(frozen=True, slots=True, kw_only=True)
class HonouredArguments:
    """Checkpointing arguments that are not torch's defaults, the call they were passed to, and a step after it."""

    arguments: Mapping[str, str]
    run: RunFacts
    call: CallFacts
