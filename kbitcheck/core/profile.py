"""What each profile promises of the half-precision parameters that are not quantized. The one place that says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kbitcheck.core.cases import Profile


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

# The profile of trainers' preparations, by the name that ``--prepare`` knows them by, where nothing is run that it could be read off.
OF_TRAINERS: Mapping[str, Profile] = MappingProxyType(
    dict.fromkeys(("trl", "llamafactory", "axolotl", "swift"), "frozen-half")
)


def assumed_profile(implementation: str) -> Profile:
    """The profile that an implementation is taken to keep, by its name alone: a trainer's own, or PEFT's."""
    if "::" in implementation:  # a function of another environment
        return "peft"
    return OF_TRAINERS.get(implementation.partition("==")[0], "peft")
