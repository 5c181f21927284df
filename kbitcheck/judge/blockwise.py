"""A training step beside its twins, block by block: which tensors are off, and by how much more than rounding."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from kbitcheck.core.facts import BlockwiseFacts, Gap
from kbitcheck.core.result import Observation

YARDSTICKS = 4
FLOAT32_ULP = 2.0**-23
# Where the stack computes the twin's bits in most tensors of a kind of block, the others differ by the order in which
# sums are added: by a few hundredths of a yardstick (measured: 0.02 to 0.04). A quarter is no rounding.
SIBLINGS_SHARE = 0.25
# The least-squares factor of n independent rounding errors has their relative size over the root of n as its standard
# deviation; eight of these happen once in 10^15. Sums added in another order move it by a few ulps of float32.
DEVIATIONS = 8
LEAST_FACTOR = 8 * FLOAT32_ULP
# Who computes with more bits than promised, as with a head in float32, is nearer to the float64 twin than the twin in the
# preparation's own dtypes. A fault beside the same rounding is farther.
MORE_EXACT = 0.9


@dataclass(frozen=True, slots=True)
class _Group:
    """The tensors of all blocks of one class. ``exact``: most of those that rounding moves have the twin's bits."""

    exact: bool
    yardstick: float

    @classmethod
    def of(cls, gaps: Iterable[Gap]) -> "_Group":
        rounded = [gap for gap in gaps if gap.live and 0 < gap.yardstick < math.inf]
        bitwise = sum(gap.bitwise for gap in rounded)
        return cls(2 * bitwise > len(rounded), median(gap.yardstick for gap in rounded) if rounded else 0.0)


def tensors_off(facts: BlockwiseFacts) -> Iterable[Observation]:
    """One observation for each tensor of the step that the float64 twin has, and whose rounding is less than itself."""
    labelled = _by_kind(facts)
    for gaps in labelled.values():
        group = _Group.of(gaps.values())
        for where, gap in gaps.items():
            if gap.bitwise or YARDSTICKS * gap.yardstick < 1:
                yield _judged(where, gap, group)


def _by_kind(facts: BlockwiseFacts) -> Mapping[str, dict[str, Gap]]:
    """The gaps by kind of block and by place, adapters with the block that they are in."""
    kinds = {part.block: part.kind for part in facts.parts.values()}
    grouped: dict[str, dict[str, Gap]] = {kind: {} for kind in kinds.values()}
    for label, part in facts.parts.items():
        grouped[part.kind].update({f"{label}: {name}" if label else name: gap for name, gap in part.gaps.items()})
    for name, gap in facts.adapters.items():
        block = next((block for block in kinds if block and f".{block}." in f".{name}"), "")
        grouped[kinds[block]][name] = gap
    return grouped


def _judged(where: str, gap: Gap, group: _Group) -> Observation:
    bound = YARDSTICKS * max(gap.yardstick, group.yardstick, FLOAT32_ULP)
    more_exact = gap.error < MORE_EXACT * gap.yardstick
    if gap.bitwise or gap.error > bound or more_exact or not group.exact:
        ok = gap.bitwise or gap.error <= bound
        return Observation(where, f"within {bound:.2e} of the float64 twin", f"off by {gap.error:.2e}", ok=ok)
    share = SIBLINGS_SHARE * max(gap.yardstick, FLOAT32_ULP)
    factor = max(DEVIATIONS * gap.from_rounded / math.sqrt(gap.elements or 1), LEAST_FACTOR)
    ok = gap.from_rounded <= share and abs(gap.factor) <= factor
    expected = f"within {share:.2e} of the twin in the same dtypes, as in the other blocks, and {factor:.1e} in scale"
    return Observation(where, expected, f"off by {gap.from_rounded:.2e}, {abs(gap.factor):.1e} in scale", ok=ok)
