"""What every case has beside its facts: its spec, its figures, its end."""

from __future__ import annotations

from typing import Any

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import Facts
from kbitcheck.core.facts.recipe import Recipe


class OpenCase(Facts):
    """A case whose facts can be read, and whose models are dropped when it is closed."""

    def __init__(self, spec: CaseSpec, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.case = spec.id
        self.profile, self.freezes, self.checkpointing = spec.profile, spec.freezes, spec.checkpointing
        self.recipe = recipe

    def summary(self) -> dict[str, Any]:
        """Figures for a report."""
        raise NotImplementedError

    def close(self) -> None:
        """Drop every model of the case."""
        self.computed.clear()
