"""The case of a watched run: what rules read of it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import BlockwiseFacts, Fact, Gap, ModelFacts, RunFacts, WatchedRun
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.observe import figures
from kbitcheck.observe.probes.switches import mode_of
from kbitcheck.observe.recipe import recipe_of_prepared, settled
from kbitcheck.observe.watch.figures import watched_figures
from kbitcheck.observe.watch.observer import Observer

T = TypeVar("T")
NOT_SEEN = "a watched run does not show it"


class WatchedCase(OpenCase):
    """Facts of a user's own run. Nothing is run for them: they were recorded while it trained."""

    def __init__(self, observer: Observer, *, profile: str, case: str = "") -> None:
        model, before = observer.model, observer.before
        assert before is not None
        source = LiveModel.of(model)
        spec = CaseSpec(
            model=source.name,
            quant=source.quant,
            implementation="",
            profile=profile,  # type: ignore[arg-type]
            checkpointing=mode_of(model),
            device=str(next(model.parameters()).device),
        )
        recipe = recipe_of_prepared(model, before) if profile == "auto" else None
        super().__init__(settled(spec, recipe), recipe)
        self.case = case or self.case
        self.by_hand = (
            self.checkpointing == "off"
        )  # a script may checkpoint by itself; what it asked for is what it does
        self._observer = observer
        self.prepared = self.wrapped = before
        self.watched: WatchedRun = observer.run
        self.remote_code = source.remote_code
        self.base = dataclasses.replace(
            before,
            parameters={n: p for n, p in before.parameters.items() if not p.adapter},
            modules={n: dataclasses.replace(m, checkpointing=None) for n, m in before.modules.items()},
        )

    def compute(self, name: str) -> Any:
        """No other fact is seen."""
        raise Unavailable(NOT_SEEN)

    trained = Fact[ModelFacts](lambda self: _seen(self._observer.after))
    run = Fact[RunFacts](lambda self: _seen(self._observer.step))
    bias_after_forward = Fact[Mapping[str, Mapping[str, str]]](lambda self: self._observer.biases)
    single_blockwise = Fact[BlockwiseFacts](lambda self: BlockwiseFacts(parts={}, adapters={}))
    single_gradients = Fact[Mapping[str, Gap]](lambda self: {})

    @Fact
    def blockwise(self) -> BlockwiseFacts:
        """One call of each block that was looked at."""
        facts = self._observer.blockwise
        if not facts.parts:
            raise Unavailable(f"no block was compared: {self.watched.unseen or 'the run was too short'}")
        return facts

    @Fact
    def gradients(self) -> Mapping[str, Gap]:
        """Those of the adapters in these blocks that have one in the float64 twin; empty where no block has adapters."""
        live = {n: g for n, g in self.blockwise.adapters.items() if g.live and math.isfinite(g.size)}
        if not live and self.blockwise.adapters:
            raise Unavailable("in the blocks that were compared no adapter has a gradient")
        return live

    def summary(self) -> dict[str, Any]:
        """Figures of a report, as ``Case.summary``, and what was watched."""
        shown = figures.summary(self, {"prepared"}, batch=None)
        blocks = sorted({part.block for part in self._observer.comparisons.parts.values()})
        run = watched_figures(self.watched, self.prepared, self._observer.step)
        return {**shown, "watched": {**run, "blocks": blocks}}


def _seen(facts: T | None) -> T:
    if facts is None:
        raise Unavailable(NOT_SEEN)
    return facts
