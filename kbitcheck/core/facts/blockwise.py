"""A training step beside its twins, block by block."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from kbitcheck.core.facts.rounding import DEVIATIONS, LEAST_FACTOR, NORMAL_MEDIAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """One tensor of a training step beside the float64 twin's and that of the twin in the preparation's own dtypes.

    ``norm`` is the tensor's Frobenius norm (None: there is no tensor, which counts as zero), ``size`` the float64 twin's.
    Relative to ``size``: ``error`` is the distance from the float64 twin, ``yardstick`` that of the same-dtype twin,
    ``from_rounded`` the distance from the same-dtype twin. ``factor`` is the least-squares factor between the tensor and
    the same-dtype twin's, less one; ``factor_noise`` is the standard deviation of ``factor`` if the differences of the two
    tensors' elements have independent signs. ``bitwise`` says that these two tensors are equal.
    """

    norm: float | None
    finite: bool
    size: float
    error: float
    yardstick: float
    from_rounded: float
    factor: float
    factor_noise: float
    bitwise: bool

    @property
    def live(self) -> bool:
        """Whether the float64 twin has a tensor that is not zero."""
        return self.size != 0


# Of the largest gradient beside it: what rounding in float64 leaves of a sum of a million terms that cancel.
CANCELLED = 2.0**-52 * 2**20


def vanishing(gradients: Mapping[str, Gap]) -> frozenset[str]:
    """Those that are there, and zero in both twins, too, but for the rounding in float64: no terms are added, or all cancel.

    As of the queries and keys of a token that attends to itself alone: a softmax over one key is constant.
    """
    noise = CANCELLED * max((g.size for g in gradients.values() if math.isfinite(g.size)), default=0.0)
    return frozenset(n for n, g in gradients.items() if g.norm == 0 and g.bitwise and g.size <= noise)


def live_ones(gradients: Mapping[str, Gap]) -> dict[str, Gap]:
    """Those that the float64 twin has, other than as its rounding."""
    zero = vanishing(gradients)
    return {n: g for n, g in gradients.items() if g.live and n not in zero}


def deviation(gaps: Iterable[Gap]) -> float:
    """How many of its own standard deviations a factor is from zero where signs are not independent, as of sums that share a rounded
    term; at least 1. ``gaps`` are those of tensors that belong together.
    """
    factors = [
        abs(gap.factor) / gap.factor_noise if gap.factor_noise else 0.0
        for gap in gaps
        if gap.live and gap.yardstick > 0
    ]
    return max(1.0, median(factors) / NORMAL_MEDIAN) if factors else 1.0


def factor_bound(gap: Gap, deviation: float) -> float:
    """How far from zero a factor is by rounding, where it is ``deviation`` as far as by independent signs."""
    return max(DEVIATIONS * deviation * gap.factor_noise, LEAST_FACTOR)


def median_yardstick(gaps: Iterable[Gap]) -> float:
    """The median over the live tensors that rounding moves; 0.0 where it moves none."""
    yardsticks = [gap.yardstick for gap in gaps if gap.live and 0 < gap.yardstick < math.inf]
    return median(yardsticks) if yardsticks else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call of a block, or what lies outside the blocks (``block`` is ""). ``kind`` is the block's class.

    ``gaps`` are those of outputs, of the gradients that leave, and of the joints: inputs and gradients that enter. ``sampled``: of some
    tokens alone, whose kernels are not those of all.
    """

    block: str
    kind: str
    gaps: Mapping[str, Gap]
    sampled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockwiseFacts:
    """One plain training step beside twins whose blocks take the inputs and the gradients of that step.

    ``parts`` are by label, in the order in which they ran; ``adapters`` are the gradients of adapters by name. ``same_kernels``:
    each block ran the kernels that its twin in the same dtypes ran, as on a CPU without a compiler, whatever the other blocks
    show; ``other_kernels``: layers of the model have kernels that no twin has. ``moved``: rounding in half precision moved the
    gate of a ReLU, which moves later gates of the whole twin's, too.
    """

    parts: Mapping[str, Part]
    adapters: Mapping[str, Gap]
    same_kernels: bool = False
    other_kernels: bool = False
    moved: bool = False
