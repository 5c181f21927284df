"""Whether a training step fits a memory size, and if not, the smallest change that makes it fit.

Everything that the answer says is confirmed by a predicted step.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts.fit import AnswerFacts, ChangeFacts
from kbitcheck.models.sources.resolve import Source
from kbitcheck.observe.forecast import parts, predict
from kbitcheck.observe.forecast.candidate import Candidate
from kbitcheck.observe.forecast.feed import NO_STEP

SHORTEST = 256  # tokens: a shorter sequence is no advice
RANKS = (8, 4)
GPUS = (2, 4, 8)
# What a model is not built for.
NOT_BUILT: Mapping[str, Any] = {
    "checkpointing": "default", "optimizer": "adamw", "batch": None, "seq_len": None, "gpus": 1, "autocast": "none",
    "loss": "full",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Trial:
    """Options to train with, those of them that were changed, and the bytes that a device then needs."""

    spec: CaseSpec
    values: Mapping[str, Any]
    needed: int

    def facts(self) -> ChangeFacts:
        options = tuple(f"--{name.replace('_', '-')} {value}" for name, value in self.values.items())
        if "gpus" in self.values:
            options = (*options, "with FSDP2")
        return ChangeFacts(
            options=options, batch=self.spec.batch or 0, seq_len=self.spec.seq_len or 0, needed=self.needed
        )


class Answer:
    """Searches the answer for a model that is built, and for others that ``source`` has; ``spec`` has the memory to fit."""

    def __init__(self, built: Candidate, source: Source, spec: CaseSpec) -> None:
        assert spec.memory is not None
        self._source, self._memory, forecast = source, spec.memory, built.forecast
        settled: Mapping[str, Any] = {
            "batch": forecast.batch, "seq_len": forecast.seq_len, "checkpointing": forecast.mode,
            "autocast": forecast.autocast,
        }  # fmt: skip
        self._spec = dataclasses.replace(spec, **settled)
        self._candidates = {_build(self._spec): built}

    @property
    def facts(self) -> AnswerFacts:
        """The answer."""
        requested = self._trial(self._spec, {})
        answer = AnswerFacts(
            memory=self._memory,
            fits=requested.needed <= self._memory,
            batch=self._spec.batch or 0,
            seq_len=self._spec.seq_len or 0,
            requested=requested.needed,
            needed=requested.needed,
        )
        if answer.fits:
            return self._largest(answer)
        change, closest = self._smallest_change(requested)
        least = closest.facts() if closest.values and not change else None
        return dataclasses.replace(answer, change=change.facts() if change else None, least=least)

    def _largest(self, answer: AnswerFacts) -> AnswerFacts:
        """The same with the largest batch, the longest sequence, and what the allocator is short of."""
        candidate, spec = self._candidate(self._spec), self._spec
        search, room = candidate.search(spec), candidate.room(spec, self._memory)
        largest = search.largest_batch(answer.seq_len, room, spec.checkpointing)
        longest = search.longest(room, spec.checkpointing)
        short = 0
        if candidate.forecast.device != "cpu" and spec.gpus == 1:
            step, limit = search.step(largest.number, answer.seq_len, spec.checkpointing), self._memory
            limit -= candidate.forecast.overhead
            short = parts.allocated(candidate.forecast, candidate.facts, step, step.trace(), limit=limit).short
        needed = candidate.needed(spec, largest.peak)
        return dataclasses.replace(answer, batch=largest.number, needed=needed, longest=longest.number, short=short)

    def _smallest_change(self, requested: _Trial) -> tuple[_Trial | None, _Trial]:
        """The least harmful change that makes it fit, else as few as do together; and what came closest."""
        changes = list(self._changes(requested))
        step_alone = self._candidate(requested.spec).room(requested.spec, self._memory) < 0
        for change in changes:
            # Changes of the step alone leave what stays through training, which is too much already.
            if not step_alone or {"optimizer", "quant", "rank", "gpus"}.intersection(change):
                trial = self._changed(requested, change)
                if trial.needed <= self._memory:
                    return trial, trial
        state, taken = requested, list[Mapping[str, Any]]()
        for change in changes:
            trial = self._changed(state, change)
            if trial.needed < state.needed:
                state, taken = trial, [*taken, change]
            if state.needed <= self._memory:
                return self._without_needless(requested, taken), state
        return None, state

    def _without_needless(self, requested: _Trial, taken: Sequence[Mapping[str, Any]]) -> _Trial:
        """The same changes without those that it fits without too; the last ones, which harm most, go first."""
        kept = list(taken)
        for change in reversed(taken):
            rest = [other for other in kept if other is not change]
            if rest and self._together(requested, rest).needed <= self._memory:
                kept = rest
        return self._together(requested, kept)

    def _together(self, trial: _Trial, changes: Sequence[Mapping[str, Any]]) -> _Trial:
        for change in changes:
            trial = self._changed(trial, change)
        return trial

    def _changes(self, requested: _Trial) -> Iterator[Mapping[str, Any]]:
        """Values of options to try, the least harmful first; None stands for the largest that fits."""
        spec, candidate = requested.spec, self._candidate(requested.spec)
        forecast, run, stored = candidate.forecast, candidate.run, self._source.quant is not None
        quant = Quantization.parse(spec.quant)
        modes = ("non-reentrant", "reentrant") if run.checkpoints else ()
        yield from ({"checkpointing": mode} for mode in modes if mode != spec.checkpointing)
        if spec.autocast == "none":
            usual = dataclasses.replace(run.runtime, autocast=predict.usual_half(run.runtime))
            yield {"autocast": predict.autocast_name(usual)}
        if (spec.batch or 1) > 1:
            yield {"batch": None}
        if spec.loss == "full":
            yield from ({"loss": loss} for loss in ("chunked", "fused"))
        yield from ({"optimizer": name} for name in ("adamw-8bit", "paged-adamw") if name != spec.optimizer)
        if not stored and _bits(quant) > _bits(Quantization()):
            yield {"quant": str(Quantization())}
        yield {"seq_len": None}
        # Adapters, their gradients and the optimizer shrink with the rank, and little else: no model is built for less.
        if requested.needed - 2 * forecast.adapters - forecast.optimizer[spec.optimizer] <= self._memory:
            yield from ({"rank": rank} for rank in RANKS if rank < spec.rank)
        if forecast.device != "cpu":
            divided = {} if stored else quant.backend.packing.divisible(quant)
            stores = {"quant": str(dataclasses.replace(quant, options=(*quant.options, *divided.items())))}
            yield from ({**(stores if divided else {}), "gpus": number} for number in GPUS if number > spec.gpus)

    def _changed(self, state: _Trial, change: Mapping[str, Any]) -> _Trial:
        values = dict(change)
        for name in ("batch", "seq_len"):
            if name in values:
                values[name] = self._most(state.spec, name)
                if values[name] is None:
                    return state
        try:
            return self._trial(dataclasses.replace(state.spec, **values), {**state.values, **values})
        except NO_STEP as error:  # this model cannot be trained so
            predict.raise_if_own(error)
            return state

    def _most(self, spec: CaseSpec, name: str) -> int | None:
        """The largest batch or length below the spec's that fits, or the least worth trying; None if there is none."""
        candidate, batch, length = self._candidate(spec), spec.batch or 1, spec.seq_len or 1
        search, room = candidate.search(spec), candidate.room(spec, self._memory)
        if name == "batch":
            fitting = 1 if room < 0 else search.largest_batch(length, room, spec.checkpointing).number
            return max(min(fitting, batch - 1), 1) if batch > 1 else None
        if batch > 1 or length <= SHORTEST:
            return None
        fitting = 0 if room < 0 else search.longest(room, spec.checkpointing).number
        return max(min(fitting, length - 1), SHORTEST)

    def _trial(self, spec: CaseSpec, values: Mapping[str, Any]) -> _Trial:
        candidate = self._candidate(spec)
        step = candidate.search(spec).step(spec.batch or 1, spec.seq_len or 1, spec.checkpointing)
        return _Trial(spec, values, candidate.needed(spec, step.peak))

    def _candidate(self, spec: CaseSpec) -> Candidate:
        key = _build(spec)
        if key not in self._candidates:
            self._candidates[key] = Candidate.built(self._source, spec)
        return self._candidates[key]


def _build(spec: CaseSpec) -> CaseSpec:
    """The same for specs whose steps are those of one model."""
    return dataclasses.replace(spec, **NOT_BUILT)


def _bits(quant: Quantization) -> int:
    return quant.backend.scheme(quant.scheme).bits
