"""The case of a composition: what rules read of its processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import CompositionFacts, Fact, Facts, ModelFacts
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.observe.composition.launch import composed
from kbitcheck.observe.preparation import checkpointed_alone

if TYPE_CHECKING:
    from kbitcheck.observe.loaded import Loaded

NOT_COMPOSED = "a composition does not show it"


class CompositionCase(OpenCase):
    """Facts of what an implementation prepares, in other processes. ``fault`` spoils these."""

    def __init__(
        self, spec: CaseSpec, function: Callable[..., Any], loaded: Loaded, fault: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(spec)
        self._function, self._loaded, self._fault = function, loaded, fault

    def compute(self, name: str) -> Any:
        """No other fact is seen."""
        raise Unavailable(NOT_COMPOSED)

    base = Fact[ModelFacts](lambda self: self._loaded.facts)
    composition = Fact[CompositionFacts](lambda self: composed(self.spec, self._function, self._fault))

    @Fact
    def unprepared(self) -> Facts:
        """The same composition of a base that transformers alone checkpoints and nothing prepares."""
        spec = dataclasses.replace(self.spec, implementation=checkpointed_alone.__name__)
        return self._loaded.witness(spec, lambda: CompositionCase(spec, checkpointed_alone, self._loaded))

    def summary(self) -> dict[str, Any]:
        """Figures for a report."""
        return {"model_class": self.base.cls}
