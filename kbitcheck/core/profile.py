"""What each profile promises of the half-precision parameters that are not quantized. The one place that says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kbitcheck.core.cases import Freezes, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Which parameters a profile casts to float32, and whether training runs under autocast.

    ``norms``: those of normalization layers. ``others``: all others (embeddings, head, biases, routers).
    """

    norms: bool
    others: bool
    autocast: bool

    def casts(self, *, norm: bool) -> bool:
        """Whether a half-precision parameter becomes float32; ``norm`` says that it belongs to a normalization layer."""
        return self.norms if norm else self.others


PROMISES: Mapping[str, Promise] = MappingProxyType(
    {
        "peft": Promise(norms=True, others=True, autocast=False),
        # Dtypes are mixed on purpose, which only autocast can run.
        "qlora": Promise(norms=True, others=False, autocast=True),
        "frozen-half": Promise(norms=False, others=False, autocast=False),
    }
)

# The one that casts nothing.
AS_LOADED: Profile = "frozen-half"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What an implementation keeps to: a profile, and when the base is frozen."""

    profile: Profile
    freezes: Freezes


OF_PEFT = Kept(profile="peft", freezes="at-prepare")
# Of trainers' preparations, by the name that ``--prepare`` knows them by. Of those that freeze at attaching, PEFT freezes the base.
OF_TRAINERS: Mapping[str, Kept] = MappingProxyType(
    {
        "trl": Kept(profile="frozen-half", freezes="at-prepare"),
        "llamafactory": Kept(profile="frozen-half", freezes="at-attach"),
        "axolotl": Kept(profile="frozen-half", freezes="at-prepare"),
        "swift": Kept(profile="frozen-half", freezes="at-attach"),
    }
)


def kept_by(implementation: str) -> Kept:
    """What an implementation is taken to keep, by its name alone: what a trainer does, or PEFT's recipe."""
    if "::" in implementation:  # a function of another environment
        return OF_PEFT
    return OF_TRAINERS.get(implementation.partition("==")[0], OF_PEFT)


def with_kept(options: Mapping[str, Any], implementation: str) -> dict[str, Any]:
    """Options of a case, whose profile and freezing, where they are not set, are those that the implementation keeps."""
    kept = kept_by(implementation)
    own = {"profile": options.get("profile") or kept.profile, "freezes": options.get("freezes") or kept.freezes}
    return {**options, **own}
