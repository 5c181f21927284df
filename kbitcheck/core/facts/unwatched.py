"""A case in a process that cannot tell who runs it."""

from collections.abc import Mapping
from dataclasses import dataclass

Digests = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnwatchedFacts:
    """Digests of a prepared model and of a few steps, by what they are of.

    ``here`` is this process. In fresh processes: ``alone`` as the first model that is prepared, ``second`` as the second; ``other`` and
    ``other_second`` are those of the model of another class that is then the first. ``kept`` is the state of the first model
    before the second is prepared and trained, ``kept_after`` that afterwards.
    """

    here: Digests
    alone: Digests
    second: Digests
    other: Digests
    other_second: Digests
    kept: Digests
    kept_after: Digests
