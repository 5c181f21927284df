"""Real training steps of a user's own script, watched from inside."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One trained tensor in one optimizer step.

    ``wanted`` of its ``elements`` have a gradient and a non-zero update in float32, of which its ``dtype`` rounds ``lost`` away;
    ``moved`` have another value after the step at a learning ``rate``. ``lands_at`` is the learning rate at which nine of ten lost
    updates would land. ``gradient`` is ``ok``, ``zero``, ``none``, ``frozen`` or ``not finite``. ``climb`` is the gradient times the
    change, without weight decay's part (0 where the step made or changed the gradient). The step's learning rate times its weight decay
    is ``decay``, and ``shrunk`` the share of the tensor that the step took away. ``stride`` is the largest change of an element without
    weight decay's part, ``size`` the root mean square of the tensor before the step. The optimizer's epsilon is ``damping`` times as
    large as the gradient's largest element (0 where it has none).
    """

    dtype: str
    elements: int
    gradient: str
    wanted: int = 0
    lost: int = 0
    moved: int = 0
    lands_at: float | None = None
    rate: float = 0.0
    climb: float = 0.0
    decay: float = 0.0
    shrunk: float = 0.0
    stride: float = 0.0
    size: float = 0.0
    damping: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Of rows, tokens or last tokens of rows (``what``) with a large gradient at the logits, ``lost`` have none behind ``place``, a block."""

    place: str
    lost: int
    of: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """What a batch teaches, as the gradient of its logits says.

    ``silent`` of its ``rows`` have none, though their labels count or no labels were passed. ``copied``: nearly every token is pulled
    to itself or the one before it, and not to the next one. ``odd`` are kinds of tokens that are learned and should not be: padding, ignored
    labels. ``weight`` is a lower bound of the sum of the tokens' weights in the loss (None: they are not pulled to the next tokens).
    """

    silent: int = 0
    rows: int = 0
    cut: tuple[Cut, ...] = ()
    copied: bool = False
    odd: tuple[str, ...] = ()
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward of a watched step.

    ``labels`` counts the tokens that the loss is computed of (None: the forward took no labels), ``weight`` is the
    gradient that entered the loss, a scaler's factor divided out (None: none did), ``counted`` says that the forward
    was passed the number of tokens to divide by. ``shifted``: each label is the next token, though the model shifts
    labels itself. ``odd`` are the kinds of what is odd about its tokens (None: it has none, or no labels beside them);
    ``repeated``: the batch before had the same tokens. ``stale`` counts the tensors that had a gradient when the
    backward began, though the step before had used it. ``cleared``: nothing had one, though a batch of the same step
    had gone backward before. ``resting`` is what eval mode switched off: blocks that checkpoint and dropouts, in words.
    ``teaching`` is None where no gradient of logits was seen. ``beside`` counts forwards before this one that were passed labels in
    train mode, with adapters, and took no gradients. ``scale`` is the gradient scaler's when the gradient entered the loss.
    ``redrawn``: dropout is on, and the random state was that before the batch before. ``follows``: a backward of the same step had run
    when its forward began. ``rates`` are the learning rates of the optimizers that had stepped before, when its forward began.
    """

    loss: float | None = None
    labels: int | None = None
    weight: float | None = None
    counted: bool = False
    shifted: bool = False
    odd: tuple[str, ...] | None = None
    repeated: bool = False
    stale: int = 0
    cleared: bool = False
    resting: str = ""
    teaching: Teaching | None = None
    beside: int = 0
    scale: float = 1.0
    redrawn: bool = False
    follows: bool = False
    rates: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedStep:
    """One optimizer step, of all optimizers that step between two forwards.

    ``rate`` is the largest learning rate of their groups, ``peak`` that of their schedules. ``skipped``: a gradient scaler left
    it out, and nothing was updated. ``undone`` are the shares of the step before that were taken back before this one's first forward,
    by tensor. The optimizers had a state of ``remembered`` tensors when they stepped, and nobody any more of those that are ``forgotten``.
    """

    rate: float
    peak: float
    batches: tuple[MicroBatch, ...]
    updates: Mapping[str, Update]
    skipped: bool = False
    undone: Mapping[str, float] = field(default_factory=dict)
    remembered: int = 0
    forgotten: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchedOn:
    """A call that switched checkpointing on: the names of the arguments that it passed, and those that are used after it."""

    passed: frozenset[str] = frozenset()
    used: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerFacts:
    """A gradient scaler: how many ``steps`` it was asked for, how many of them it ``skipped``, and its ``scales`` at each.

    ``limit`` is the largest number that every dtype has in which the model computes.
    ``clipped`` are the parameters whose gradient was smaller when it was unscaled than the backward left it; ``float16``
    those whose gradient is in float16.
    """

    steps: int = 0
    skipped: int = 0
    scales: tuple[float, ...] = ()
    limit: float = 0.0
    clipped: tuple[str, ...] = ()
    float16: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeardWarning:
    """A warning of the run, cut short, that is ``about`` how the model trains. ``grave``: something is wrong or costs."""

    about: str
    text: str
    grave: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """What one of several processes holds of what trains: by step, digests of the tensors that are whole there before its first forward.

    ``rank`` is the process's own, ``peers`` are the ranks that it trains with. ``wrapped``: DistributedDataParallel averages gradients,
    but for those of the tensors that it ``leaves_out``. Of ``sharded`` tensors this process has a part alone.
    """

    rank: int
    peers: tuple[int, ...]
    steps: tuple[Mapping[str, str], ...]
    wrapped: bool = False
    leaves_out: frozenset[str] = frozenset()
    sharded: int = 0

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        return {**asdict(self), "leaves_out": sorted(self.leaves_out)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        lists = {"peers": tuple(data["peers"]), "steps": tuple(data["steps"])}
        return cls(**{**data, **lists, "leaves_out": frozenset(data["leaves_out"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedRun:
    """Steps of a run, what its optimizer holds, and what reached the model.

    ``adapters`` are the names of parameters of active adapters and of what the caller says trains,
    ``held`` those of the optimizer's parameters in the model, ``foreign`` the number of its other parameters; ``copied`` are
    held parameters beside which the model trains a copy.
    ``switched_on`` are the calls that switched checkpointing on, in order; the first may stand for those before.
    ``cached`` says who asked for a cache in training, or that one was made; "" where none was.
    ``entering`` are the dtypes that entered quantized layers, with the number of layers. ``unseen`` is why no block was
    compared with twins; empty where some were. ``assumed`` describes the optimizer where the caller named none: its steps are
    a forecast. ``scaler`` is None where no gradient scaler is used, ``warnings`` where nobody listened.
    ``optimizers`` are the classes of those that stepped. ``idle`` are the modules that no input reached: experts without tokens, and
    the blocks of a tower none of which ran. ``repeated`` says of a parameter that is stepped twice how. ``scalings`` are the numbers by
    which active adapters multiply what they add, by module. ``outliving``: how many blocks' outputs were held two steps
    later, and of how many. ``taken_in_turns`` counts the tensors that several optimizers hold which step in turns. ``replicas`` are
    what each of several processes holds, as far as they were watched.
    ``untaught`` are tensors whose gradient is zero in twins, too: tokens and labels have nothing to teach them.
    ``cast`` has the dtype in which an optimizer took a parameter that was cast to half precision after that, by its name.
    """

    steps: tuple[WatchedStep, ...]
    adapters: frozenset[str]
    held: frozenset[str]
    foreign: int = 0
    copied: tuple[str, ...] = ()
    switched_on: tuple[SwitchedOn, ...] = ()
    entering: Mapping[str, int] = field(default_factory=dict)
    attention: str = ""
    cached: str = ""
    unseen: str = ""
    assumed: str = ""
    scaler: ScalerFacts | None = None
    warnings: tuple[HeardWarning, ...] | None = None
    optimizers: tuple[str, ...] = ()
    idle: frozenset[str] = frozenset()
    repeated: Mapping[str, str] = field(default_factory=dict)
    scalings: Mapping[str, float] = field(default_factory=dict)
    outliving: tuple[int, int] = (0, 0)
    taken_in_turns: int = 0
    replicas: tuple[Replica, ...] = ()
    cast: Mapping[str, str] = field(default_factory=dict)
    untaught: frozenset[str] = frozenset()
