"""What users do with a prepared model later on, beside the same done with its base."""

from dataclasses import dataclass

from kbitcheck.core.facts.step import Distance


@dataclass(frozen=True, slots=True, kw_only=True)
class UseFacts:
    """One value that came of a use: as the base gives it, and as the prepared model does.

    ``same``: equal, or the base raises. ``distance`` is that of two tensors of one shape that are not equal; its yardstick is the base's own
    rounding.
    """

    use: str
    what: str
    expected: str
    actual: str
    same: bool
    distance: Distance | None = None
