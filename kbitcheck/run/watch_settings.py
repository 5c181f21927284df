"""How a user's own training is watched and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from kbitcheck.core.cases import Profile
from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import Rule, select
from kbitcheck.core.training import STEPS

# These say more than the steps of a run show: that nothing warned, how often a plain step runs each block, and that every
# adapter is reached. KB718 and KB719 are of watched runs.
NOT_WATCHED = ("KB403", "KB407", "KB904")
CASE = "watched run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run is watched and judged; JSON-able. ``case`` names the run where a report has several."""

    steps: int = STEPS
    select: Sequence[str] = ()
    ignore: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    profile: Profile = "auto"
    trains: Sequence[str] = ()
    case: str = CASE

    @property
    def rules(self) -> list[Rule]:
        """The rules that are judged; a ``UsageError`` where none has such a code."""
        return [rule for rule in select(self.select, self.ignore) if rule.code not in NOT_WATCHED]

    def validate(self) -> None:
        """Raise ``UsageError`` for a wrong value."""
        if self.select or self.ignore:  # else no rule is imported before it is judged
            _ = self.rules
        if self.steps < 1:
            raise UsageError(f"steps wants a whole number of at least 1, not {self.steps!r}")
        if self.profile not in get_args(Profile):
            raise UsageError(f"no such profile: {self.profile!r}; use {', '.join(get_args(Profile))}")
