"""Whether training fits, and where its bytes are: plain data of the forecast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingFacts:
    """The most bytes on the device while the model is loaded, which is when ``tensor`` is; ``how`` says why more than it weighs."""

    peak: int
    tensor: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFacts:
    """Bytes of one ``kind`` that are alive at the peak of a step; ``where`` is the block or the group, "" for neither."""

    kind: str
    where: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveFacts:
    """Bytes alive through one step, by kind, beside what stays: at each of some points, the fullest moment since the last.

    The backward begins at the point ``turn``; ``blocks`` are the points at which the forward has left each block.
    """

    kinds: Mapping[str, Sequence[int]]
    turn: int
    blocks: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellFacts:
    """What a device needs for a predicted step of ``batch`` x ``seq_len`` tokens, in bytes.

    ``short`` is what CUDA's allocator would be short of in the requested memory, as simulated for a step that fits it.
    """

    batch: int
    seq_len: int
    needed: int
    short: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeFacts:
    """Options that were tried instead, and the bytes that a device needs with them for ``batch`` x ``seq_len`` tokens."""

    options: tuple[str, ...]
    batch: int
    seq_len: int
    needed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFacts:
    """Whether the requested step fits ``memory``, confirmed by predicted steps.

    ``requested`` is what the requested step needs on the device, in bytes. If it fits: the largest batch at ``seq_len``,
    what it ``needed``, the ``longest`` single sequence, and how many bytes CUDA's allocator would be ``short`` of, as
    simulated, for its holes (0: none, or not simulated). If not: in ``change`` the smallest change that makes it fit; None
    where nothing that was tried does, when ``least`` has what came closest.
    """

    memory: int
    fits: bool
    batch: int
    seq_len: int
    requested: int
    needed: int
    short: int = 0
    longest: int = 0
    change: ChangeFacts | None = None
    least: ChangeFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareFacts:
    """Bytes on each of several GPUs under one ``strategy``; ``extra`` is what it needs beside its share.

    ``note`` says what is not divided; ``loads_whole`` that each GPU first holds the whole model, as it was loaded. ``dtypes`` is
    what the strategy says to the dtypes in one of its units.
    """

    strategy: str
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    extra: int
    loads_whole: bool
    note: str = ""
    dtypes: str = ""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.extra
