"""A training step beside its twins, block by block."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """One tensor of a training step beside the float64 twin's and that of the twin in the preparation's own dtypes.

    ``norm`` is the tensor's Frobenius norm (None: there is no tensor, which counts as zero), ``size`` the float64 twin's.
    Relative to ``size``: ``error`` is the distance from the float64 twin, ``yardstick`` that of the same-dtype twin,
    ``from_rounded`` the distance from the same-dtype twin. ``factor`` is the least-squares factor between the tensor and
    the same-dtype twin's, less one. ``bitwise`` says that these two are equal.
    """

    norm: float | None
    finite: bool
    size: float
    elements: int
    error: float
    yardstick: float
    from_rounded: float
    factor: float
    bitwise: bool

    @property
    def live(self) -> bool:
        """Whether the float64 twin has a tensor that is not zero."""
        return self.size != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call of a block, or what lies outside the blocks (``block`` is ""). ``kind`` is the block's class.

    ``gaps`` are those of outputs, of the gradients that leave, and of the joints: inputs and gradients that enter.
    """

    block: str
    kind: str
    gaps: Mapping[str, Gap]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockwiseFacts:
    """One plain training step beside twins whose blocks take the inputs and the gradients of that step.

    ``parts`` are by label, in the order in which they ran; ``adapters`` are the gradients of adapters by name.
    """

    parts: Mapping[str, Part]
    adapters: Mapping[str, Gap]
