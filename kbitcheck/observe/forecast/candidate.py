"""A model as it is built for some options, and what a device needs for steps of it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import ForecastFacts, ModelFacts
from kbitcheck.models.sources.resolve import Source
from kbitcheck.observe.forecast import predict, shares
from kbitcheck.observe.forecast.loading import while_loading
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.search import Search
from kbitcheck.observe.probes.snapshot import snapshot

LARGE = 1 << 50  # bytes: more than any step takes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model's forecast without steps, its snapshot, and its steps by runtime."""

    forecast: ForecastFacts
    facts: ModelFacts
    run: predict.Training
    searches: dict[Runtime, Search] = field(default_factory=dict)

    @classmethod
    def built(cls, source: Source, spec: CaseSpec) -> "Candidate":
        """The model that a spec's quantization, rank and attention give."""
        model = source.meta(Quantization.parse(spec.quant))
        facts = snapshot(model)
        forecast = with_loading(predict.of_weights(model, facts, spec), source, model, facts)
        runtime = predict.runtime_of(spec, "cpu" if forecast.device == "cpu" else "cuda")
        return cls(forecast, facts, predict.Training(source, model, facts, spec, runtime))

    def search(self, spec: CaseSpec) -> Search:
        """The steps under the spec's autocast and loss."""
        runtime = predict.runtime_of(spec, self.run.runtime.device)
        if runtime not in self.searches:
            self.searches[runtime] = self.run.search(self.run.limit, runtime)
        return self.searches[runtime]

    def needed(self, spec: CaseSpec, peak: int) -> int:
        """Bytes of the device, what CUDA itself takes included, if a step takes ``peak`` bytes, or while loading if more.

        Of several GPUs, each under the strategy that takes least.
        """
        forecast = dataclasses.replace(self.forecast, chosen=spec.optimizer)
        loaded = forecast.loading.peak if forecast.loading else 0
        if spec.gpus == 1:
            return forecast.overhead + max(forecast.resident + max(peak, forecast.adapters), loaded)
        of_gpus = shares.of_gpus(forecast, self.facts, Quantization.parse(spec.quant), spec.gpus, peak=peak)
        return forecast.overhead + min(max(share.total, loaded * share.loads_whole) for share in of_gpus)

    def room(self, spec: CaseSpec, memory: int) -> int:
        """The most bytes that a step may take; no step may if it is negative."""
        return memory - self.needed(spec, LARGE) + LARGE if self.needed(spec, 0) <= memory else -1


def with_loading(forecast: ForecastFacts, source: Source, model: Any, facts: ModelFacts) -> ForecastFacts:
    """The same with the peak while the model is loaded."""
    dtype, stored = getattr(torch, source.unquantized_dtype), source.quant is not None
    return dataclasses.replace(forecast, loading=while_loading(model, facts, stored=stored, dtype=dtype))
