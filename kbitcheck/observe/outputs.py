"""What a prepared model computes: its outputs under every condition, its logits, and what an evaluation or a save leaves."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import torch

from kbitcheck.core.errors import Unavailable, cause
from kbitcheck.core.facts import (
    CANNOT_RUN,
    Cost,
    Fact,
    ForwardFacts,
    FunctionFacts,
    Passes,
    StartFacts,
    StoreFacts,
    fact,
)
from kbitcheck.core.profile import PROMISES
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import forwards, memory, routers
from kbitcheck.observe.store import round_trip
from kbitcheck.observe.twin.twins import Twins, root_mean_square_error


class Outputs:
    """Facts of forwards, each on a fresh prepared copy, without adapters; ``on_cut`` has those of a cut, where there is one."""

    def __init__(self, preparation: Preparation, on_cut: "Outputs | None" = None) -> None:
        self.paths = on_cut or self
        self._preparation = preparation
        self._loaded = preparation.loaded
        self._profile = preparation.spec.profile
        self.computed = preparation.computed

    _base_training_forwards = Fact(
        lambda self: self._loaded.forwards,
        cost=Cost("cut", Passes(forwards=4, copies=1), shared=True, models=1),
    )
    base_forwards = Fact(
        lambda self: self._base_training_forwards.all,
        cost=Cost(
            "cut",
            Passes(forwards=9, backwards=1),
            needs=("_base_training_forwards",),
            shared=True,
            models=1,
            large=Cost(),  # of a large model these run with the others
        ),
    )
    base_logits = Fact(
        lambda self: self._loaded.function(self._profile),
        cost=Cost("cut", Passes(forwards=2, float64_forwards=1, copies=3), shared=True, models=1),
    )
    twins = Fact[Twins](
        lambda self: self._loaded.twins(self._preparation.spec),
        cost=Cost(
            "whole",
            Passes(forwards=2, backwards=2, float64_forwards=2, float64_backwards=2, copies=2),
            shared=True,
            models=2,
            large=Cost(),  # a large model's twins go block by block
        ),
    )

    @fact(
        Cost(
            "cut",
            Passes(forwards=4, copies=1, calls=1),
            needs=("_base_training_forwards",),
            models=1,
            large=Cost(
                "cut",
                Passes(forwards=22, backwards=2, copies=1, calls=1),
                needs=("_base_training_forwards",),
                models=1,
            ),
        )
    )
    def _training_forwards(self) -> tuple[list[ForwardFacts], Iterator[ForwardFacts]]:
        """The forwards in train mode, and the others, which run when they are iterated over.

        All run at once where the copy cannot be kept: that of a large model, or what a caller lent.
        """
        self._loaded.require_step()
        self._preparation.make_room()
        unprepared = self._base_training_forwards
        kept = self._loaded.copies and not (self._loaded.large or self._loaded.of_large)
        if not kept:
            _ = unprepared.all  # first, so that its copy of the base is gone
        every = forwards.everywhere(self._preparation.prepared_copy(), self._loaded.batch, self._loaded.half)
        base = unprepared.in_training
        first = list(forwards.compare(islice(every, len(base)), base, base))

        def others() -> Iterator[ForwardFacts]:
            base = self.base_forwards if kept else unprepared.all
            yield from forwards.compare(every, base[len(first) :], base)

        return first, others() if kept else iter(list(others()))

    @property
    def training_forwards(self) -> Sequence[ForwardFacts]:
        """The first ``forwards``: those in train mode that are fed the batch."""
        return self._training_forwards[0]

    @fact(
        Cost(
            "cut",
            Passes(forwards=9, backwards=1),
            needs=("_training_forwards", "base_forwards"),
            large=Cost(needs=("_training_forwards",)),
        )
    )
    def forwards(self) -> Sequence[ForwardFacts]:
        first, others = self._training_forwards
        wide = partial(forwards.everywhere, batch=self._loaded.batch, half=self._loaded.half)
        return forwards.beside_wide([*first, *others], lambda: wide(self._loaded.wide()))

    def require_forward(self) -> None:
        """Raise ``Unavailable`` if no training forward of the prepared model runs, and the base's does: KB210 reports it."""
        for f in self.paths.training_forwards:
            if f.raised and not f.base_raised and f.autocast is PROMISES[self._profile].autocast:
                raise Unavailable(f"{CANNOT_RUN}{f.raised}", raised=f.raised)

    @fact(Cost("cut", Passes(forwards=1, copies=1, calls=1), needs=("_training_forwards", "base_logits"), models=1))
    def function(self) -> FunctionFacts:
        self.require_forward()
        expected = self.base_logits
        exact = expected.exact.logits
        logits, routes = self._loaded.logits(self._preparation.prepared_copy(), self._profile)
        keep = routers.unmoved(exact, expected.exact.routes, routes, expected.original.routes, expected.rounded.routes)
        return FunctionFacts(
            base_error=root_mean_square_error(expected.original.logits, exact, keep),
            error=root_mean_square_error(logits, exact, keep),
            twin_error=root_mean_square_error(expected.rounded.logits, exact, keep),
            ulp=float(torch.finfo(torch.float32).eps),
            left_out=int((~keep).sum()),
            tokens=keep.numel(),
        )

    @fact(Cost("cut", Passes(forwards=2, copies=1, calls=1), needs=("_training_forwards",), models=1))
    def start(self) -> StartFacts:
        spec = self._preparation.spec
        configured = self._loaded.adapters.configured(spec)
        if configured is None:
            raise Unavailable("a plain LoRA starts at zero: for a configuration of --adapters")
        if configured.prompts:
            raise Unavailable("virtual tokens change what a model computes from the start")
        self.require_forward()
        model = self._preparation.prepared_copy()
        before = self._loaded.logits(model, self._profile)
        after = self._loaded.logits(configured.start_on(model), self._profile)
        keep = routers.unmoved(before.logits, before.routes, after.routes)
        apart = root_mean_square_error(after.logits, before.logits, keep)
        return StartFacts(apart=apart, left_out=int((~keep).sum()), tokens=keep.numel())

    @fact(Cost("cut", Passes(forwards=2, copies=1, calls=1), models=1))
    def left_by_evaluation(self) -> int:
        self._loaded.require_step()
        model, batch, autocast = self._preparation.prepared_copy(), self._loaded.batch, self._preparation.autocast
        try:
            return memory.left_by_evaluation(model, batch, autocast)
        except Exception as error:  # the model's own code may raise anything
            failed = forwards.evaluate(self._loaded.copy(), batch, autocast).raised
            if isinstance(error, torch.OutOfMemoryError) or not failed:
                raise
            raise Unavailable(f"the unprepared base does not evaluate, either: {cause(error)}") from error

    @fact(Cost("cut", Passes(forwards=2, copies=1, calls=2), models=1))
    def round_trip(self) -> StoreFacts:
        self._loaded.require_step()
        return round_trip(self._preparation)
