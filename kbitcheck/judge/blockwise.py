"""A training step beside its twins: which tensors are off, and by how much more than rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kbitcheck.core.facts import FLOAT32_ULP, YARDSTICKS, BlockwiseFacts, Gap, median_yardstick
from kbitcheck.core.facts.blockwise import deviation, factor_bound
from kbitcheck.core.result import Observation

# Where the stack computes the twin's bits in most tensors of a kind of block, the others differ by the order in which
# sums are added: by a few hundredths of a yardstick (measured: 0.02 to 0.04). A quarter is no rounding.
SIBLINGS_SHARE = 0.25
# Who computes with more bits than promised, as with a head in float32, is nearer to the float64 twin than the twin in the
# preparation's own dtypes. A fault beside the same rounding is farther.
MORE_EXACT = 0.9


@dataclass(frozen=True, slots=True)
class _Group:
    """What tensors that belong together show: all of one kind of block, or the adapters' gradients of a whole model.

    ``exact``: most of those that rounding moves have the twin's bits, or must have them. ``deviation`` is that of their factors.
    """

    yardstick: float
    exact: bool = False
    deviation: float = 1.0

    @classmethod
    def of(cls, gaps: Iterable[Gap], *, exact: bool = False) -> _Group:
        """Of the tensors of one kind of block; ``exact`` where more than these tensors show it."""
        rounded = [gap for gap in gaps if gap.live and gap.yardstick > 0]
        bitwise = sum(gap.bitwise for gap in rounded)
        return cls(median_yardstick(rounded), exact or 2 * bitwise > len(rounded), deviation(rounded))


def tensors_off(facts: BlockwiseFacts) -> Iterable[Observation]:
    """One observation for each tensor of the step that the float64 twin has, and whose rounding is less than itself."""
    sampled = {part.kind for part in facts.parts.values() if part.sampled}
    for kind, gaps in _by_kind(facts).items():
        group = _Group.of(gaps.values(), exact=facts.same_kernels)
        group = replace(group, exact=False) if kind in sampled or facts.other_kernels else group
        for where, gap in gaps.items():
            if measurable(gap):
                yield _judged_by_siblings(where, gap, group)


def gradients_off(gradients: Mapping[str, Gap]) -> list[Observation]:
    """One observation for each live adapter of a whole model, unless its gradient is noise."""
    group = _Group(median_yardstick(gradients.values()))
    return [_judged(name, gap, group) for name, gap in gradients.items() if gap.live and measurable(gap)]


def measurable(gap: Gap) -> bool:
    """True unless four yardsticks are as long as the tensor: no comparison could then tell it from zero."""
    return gap.bitwise or YARDSTICKS * gap.yardstick < 1


def _by_kind(facts: BlockwiseFacts) -> Mapping[str, dict[str, Gap]]:
    """The gaps by kind of block and by place, adapters with the block that they are in."""
    kinds = {part.block: part.kind for part in facts.parts.values()}
    grouped: dict[str, dict[str, Gap]] = {kind: {} for kind in kinds.values()}
    for label, part in facts.parts.items():
        grouped[part.kind].update({f"{label}: {name}" if label else name: gap for name, gap in part.gaps.items()})
    for name, gap in facts.adapters.items():
        block = next((block for block in kinds if block and f".{block}." in f".{name}"), "")
        place = f"{block}: gradient of {f'.{name}'.partition(f'.{block}.')[2]}" if block else f"gradient of {name}"
        grouped[kinds[block]][place] = gap
    return grouped


def _judged(where: str, gap: Gap, group: _Group) -> Observation:
    """By the distance from the float64 twin."""
    bound = YARDSTICKS * max(gap.yardstick, group.yardstick, FLOAT32_ULP)
    missing = gap.norm is None and gap.live
    ok = gap.bitwise or (gap.error <= bound and not missing)
    actual = "missing" if missing else f"off by {gap.error:.2e}"
    return Observation(where, f"within {bound:.2e} of the float64 twin", actual, ok=ok)


def _judged_by_siblings(where: str, gap: Gap, group: _Group) -> Observation:
    """By the distance from the float64 twin, and then by that from the same-dtype twin, as other blocks show it."""
    judged = _judged(where, gap, group)
    more_exact = gap.error < MORE_EXACT * gap.yardstick
    if gap.bitwise or not judged.ok or more_exact:
        return judged
    factor = factor_bound(gap, group.deviation)
    if abs(gap.factor) > factor:
        expected = f"within {factor:.1e} of the twin in the same dtypes in scale"
        return Observation(where, expected, f"off by {abs(gap.factor):.1e} in scale", ok=False)
    share = SIBLINGS_SHARE * max(gap.yardstick, FLOAT32_ULP)
    if group.exact and gap.from_rounded > share:
        expected = f"within {share:.2e} of the twin in the same dtypes, whose kernels are the same"
        return Observation(where, expected, f"off by {gap.from_rounded:.2e}", ok=False)
    return judged
