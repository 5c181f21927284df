"""Whether a training step fits a memory size, and if not, the smallest change that makes it fit.

Everything that the answer says is confirmed by a predicted step.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import ForecastFacts, ModelFacts
from kbitcheck.core.facts.fit import AnswerFacts, ChangeFacts
from kbitcheck.models.sources.resolve import Source
from kbitcheck.observe.forecast import parts, predict, shares
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.search import Search
from kbitcheck.observe.probes.snapshot import snapshot

SHORTEST = 256  # tokens: a shorter sequence is no advice
RANKS = (8, 4)
GPUS = (2, 4, 8)
LARGE = 1 << 50  # more than any step takes
# What a step's bytes do not depend on, or what a search is asked for.
NOT_BUILT = {
    "checkpointing": "default",
    "optimizer": "adamw",
    "batch": None,
    "seq_len": None,
    "gpus": 1,
    "memory": None,
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model as built for some options: its forecast without steps, its snapshot, and its steps by runtime."""

    forecast: ForecastFacts
    facts: ModelFacts
    run: predict.Training
    limit: int
    searches: dict[Runtime, Search] = field(default_factory=dict)

    def search(self, spec: CaseSpec) -> Search:
        """The steps under the spec's autocast."""
        runtime = predict.runtime_of(spec, self.run.runtime.device)
        if runtime not in self.searches:
            self.searches[runtime] = self.run.search(self.limit, runtime)
        return self.searches[runtime]


@dataclass(frozen=True, slots=True)
class _Try:
    """Options to train with, those of them that were ``changed`` as a user writes them, and what a device then needs."""

    spec: CaseSpec
    changed: tuple[str, ...] = ()
    needed: int = 0

    def facts(self) -> ChangeFacts:
        assert self.spec.batch is not None
        assert self.spec.seq_len is not None
        return ChangeFacts(options=self.changed, batch=self.spec.batch, seq_len=self.spec.seq_len, needed=self.needed)


@dataclass(frozen=True, slots=True)
class _Change:
    """Values of options that replace others."""

    values: dict[str, Any] = field(default_factory=dict)

    @property
    def option(self) -> str:
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.values.items())


class Answer:
    """Searches the answer for a model that is built, and for others that ``source`` has; ``spec`` has the memory to fit."""

    def __init__(self, built: Candidate, source: Source, spec: CaseSpec) -> None:
        assert spec.memory is not None
        self._source, self._memory = source, spec.memory
        forecast = built.forecast
        mode: Any = forecast.mode
        autocast: Any = forecast.autocast
        self._spec = dataclasses.replace(
            spec, batch=forecast.batch, seq_len=forecast.seq_len, checkpointing=mode, autocast=autocast
        )
        self._models, self._runtime = {_build(self._spec): built}, built.run.runtime

    @property
    def facts(self) -> AnswerFacts:
        """The answer."""
        asked = self._tried(self._spec, ())
        if asked.needed > self._memory:
            return self._does_not_fit(asked)
        model, room = self._built(self._spec), self._room(self._spec)
        length, mode = model.forecast.seq_len, model.forecast.mode
        search = model.search(self._spec)
        largest, longest = search.largest_batch(length, room, mode), search.longest(room, mode)
        best = self._tried(dataclasses.replace(self._spec, batch=largest.number), ())
        step = search.step(largest.number, length, mode)
        limit = self._memory - model.forecast.overhead
        short = 0
        if model.forecast.device != "cpu" and self._spec.gpus == 1:
            short = parts.allocated(model.forecast, model.facts, step, step.trace(), limit=limit).short
        return AnswerFacts(
            memory=self._memory,
            fits=True,
            batch=largest.number,
            seq_len=length,
            requested=asked.needed,
            needed=best.needed,
            short=short,
            longest=longest.number,
        )

    def _does_not_fit(self, asked: _Try) -> AnswerFacts:
        change, least = self._smallest_change(asked)
        return AnswerFacts(
            memory=self._memory,
            fits=False,
            batch=self._spec.batch or 1,
            seq_len=self._spec.seq_len or 0,
            requested=asked.needed,
            needed=asked.needed,
            change=change.facts() if change else None,
            least=None if change or not least.changed else least.facts(),
        )

    def _smallest_change(self, asked: _Try) -> tuple[_Try | None, _Try]:
        """One change that makes it fit, the least harmful; else as few as do together; and what came closest."""
        state = asked
        for change in self._changes(asked.spec):
            tried = self._changed(asked, change)
            if tried.needed <= self._memory:
                return tried, tried
        taken: list[_Change] = []
        for change in self._changes(asked.spec):
            tried = self._changed(state, change)
            if tried.needed >= state.needed:
                continue
            state, taken = tried, [*taken, change]
            if state.needed <= self._memory:
                return self._without_needless(asked, taken), state
        return None, state

    def _without_needless(self, asked: _Try, taken: Sequence[_Change]) -> _Try:
        """The same changes but those without which it fits as well, the most harmful first to go."""
        kept = list(taken)
        for change in reversed(taken[:-1]):
            rest = [c for c in kept if c is not change]
            if self._all(asked, rest).needed <= self._memory:
                kept = rest
        return self._all(asked, kept)

    def _all(self, asked: _Try, changes: Sequence[_Change]) -> _Try:
        for change in changes:
            asked = self._changed(asked, change)
        return asked

    def _changes(self, spec: CaseSpec) -> Iterator[_Change]:
        """What can be changed, the least harmful first."""
        model = self._models[_build(spec)]
        modes = ("non-reentrant", "reentrant") if model.run.checkpoints else ()
        yield from (_Change({"checkpointing": mode}) for mode in modes if mode != spec.checkpointing)
        if spec.autocast == "none":
            yield _Change({"autocast": _half(model.run.runtime)})
        if (spec.batch or 1) > 1:
            yield _Change({"batch": None})
        yield from (_Change({"optimizer": name}) for name in ("adamw-8bit", "paged-adamw") if name != spec.optimizer)
        if self._source.quant is None and _bits(Quantization.parse(spec.quant)) > _bits(Quantization()):
            yield _Change({"quant": str(Quantization())})
        yield _Change({"seq_len": None})
        yield from (_Change({"rank": rank}) for rank in RANKS if rank < spec.rank)
        if model.forecast.device != "cpu":
            yield from (_Change({"gpus": number}) for number in GPUS if number > spec.gpus)

    def _changed(self, state: _Try, change: _Change) -> _Try:
        """What a state needs with a change; a batch or length of None is the largest that fits, if any does."""
        spec = dataclasses.replace(state.spec, **{n: v for n, v in change.values.items() if v is not None})
        if None in change.values.values():
            (name,) = change.values
            number = self._largest(spec, name)
            if number is None:
                return state
            change = _Change({name: number})
            spec = dataclasses.replace(spec, **change.values)
        name = next(iter(change.values))
        changed = tuple(option for option in state.changed if not option.startswith(f"--{name.replace('_', '-')} "))
        return self._tried(spec, (*changed, change.option))

    def _largest(self, spec: CaseSpec, name: str) -> int | None:
        """The largest batch below the spec's, or length, that fits; the smallest worth trying if none does."""
        model, room = self._built(spec), self._room(spec)
        assert spec.batch is not None
        assert spec.seq_len is not None
        if name == "batch":
            largest = model.search(spec).largest_batch(spec.seq_len, room, spec.checkpointing).number
            return max(min(largest, spec.batch - 1), 1) if spec.batch > 1 else None
        if spec.seq_len <= SHORTEST or spec.batch > 1:
            return None
        largest = model.search(spec).longest(room, spec.checkpointing).number
        return max(min(largest, spec.seq_len - 1), SHORTEST)

    def _room(self, spec: CaseSpec) -> int:
        """Bytes that a step may take."""
        return self._memory - self._needed(spec, LARGE) + LARGE

    def _tried(self, spec: CaseSpec, changed: tuple[str, ...]) -> _Try:
        model = self._built(spec)
        assert spec.batch is not None
        assert spec.seq_len is not None
        step = model.search(spec).step(spec.batch, spec.seq_len, spec.checkpointing)
        return _Try(spec, changed, self._needed(spec, step.peak))

    def _needed(self, spec: CaseSpec, peak: int) -> int:
        """Bytes that a device needs for a step that takes ``peak`` bytes, under the strategy that takes least."""
        model = self._built(spec)
        forecast = dataclasses.replace(model.forecast, chosen=spec.optimizer)
        needed = forecast.resident + max(peak, forecast.adapters)
        if spec.gpus > 1:
            quant = Quantization.parse(spec.quant)
            of_gpus = shares.of_gpus(forecast, model.facts, quant, spec.gpus, peak=peak)
            needed = min(share.total for share in of_gpus)
        return needed + forecast.overhead

    def _built(self, spec: CaseSpec) -> Candidate:
        key = _build(spec)
        if key not in self._models:
            model = self._source.meta(Quantization.parse(spec.quant))
            facts = snapshot(model)
            forecast, limit = predict.of_weights(model, facts, spec), predict.token_limit(model)
            run = predict.Training(self._source, model, facts, spec, self._runtime)
            self._models[key] = Candidate(forecast, facts, run, limit)
        return self._models[key]


def _half(runtime: Runtime) -> str:
    return predict.autocast_name(dataclasses.replace(runtime, autocast=predict.usual_half(runtime)))


def _bits(quant: Quantization) -> int:
    return quant.backend.scheme(quant.scheme).bits


def _build(spec: CaseSpec) -> CaseSpec:
    """The same for specs whose steps are those of one model."""
    same: dict[str, Any] = NOT_BUILT
    return dataclasses.replace(spec, **same)
