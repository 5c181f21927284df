"""A case that is judged without weights: its facts are sizes, shapes and types."""

import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.anatomy import norm_parameters
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import HALF, Fact, ForecastFacts
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.machine import LARGE_BYTES
from kbitcheck.core.profile import PROMISES
from kbitcheck.models.sources.resolve import Source, source_of
from kbitcheck.observe.device import free_bytes
from kbitcheck.observe.forecast import fitting, predict
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import snapshot

NEEDS_A_RUN = "needs a run: the audit is static"


class StaticCase(OpenCase):
    """Facts of a model on the meta device. What needs a run is not applicable; ``weights`` is the forecast without steps."""

    def __init__(self, spec: CaseSpec, source: Source) -> None:
        super().__init__(spec)
        foreign = getattr(source, "foreign", "")
        own = f"; its own {foreign} quantization is not verified, sizes are those of {spec.quant}" if foreign else ""
        self.why = "no weights were read" + own
        self._source = source
        self._model: Any = source.meta(Quantization.parse(spec.quant))
        self.base = snapshot.snapshot(self._model)
        self.remote_code = source.remote_code
        self.weights = predict.of_weights(self._model, self.base, spec, source.notes)
        wanted = adapter_probe.target_layers(self._model, spec.targets) if self.base.layers else []
        self.unfit_targets = adapter_probe.unfit(self._model, wanted)

    def compute(self, name: str) -> Any:
        raise Unavailable(NEEDS_A_RUN)

    @Fact
    def forecast(self) -> ForecastFacts:
        return fitting.with_steps(self.weights, self._source, self._model, self.base, self.spec)

    @Fact
    def widened(self) -> Mapping[str, int]:
        norms, promise = norm_parameters(self.base), PROMISES[self.profile]
        return {
            name: t.nbytes
            for name, t in self.base.parameters.items()
            if not t.packed and t.dtype in HALF and promise.casts(norm=name in norms)
        }

    def summary(self) -> dict[str, Any]:
        """Facts for the head and the memory table of a report."""
        forecast = self.forecast if "forecast" in self.computed else self.weights
        return {
            "static": self.why,
            "model_class": self.base.cls,
            "parameters": forecast.parameters,
            "bytes_loaded": forecast.loaded,
            "bytes_prepared": forecast.loaded + forecast.upcast,
            "forecast": forecast.as_json(),
        }


def audit_seconds(forecast: ForecastFacts) -> float:
    """About what a full audit takes on this CPU.

    0.8 s for a million parameters, as it took on the Xeon of ``benchmarks/sizes.json``, and what half-precision products
    cost more elsewhere: on an EPYC, where one with a million weights takes 6 ms, it was 3.4 s.
    """
    return forecast.parameters / 1e6 * (0.8 + 400 * product_seconds())


@cache
def product_seconds() -> float:
    """What this CPU takes for a bfloat16 product of 48 tokens with a million weights: the least of a few times."""
    x, weight = torch.ones(48, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        took.append(time.perf_counter() - start)
    return min(took)


def static_case(spec: CaseSpec, seconds: float) -> StaticCase | None:
    """The static case that a spec asks for, or of a model for whose full audit there is no room or not enough ``seconds``."""
    if spec.static == "never":
        return None
    case = StaticCase(spec, source_of(spec, static=spec.static))
    if spec.static == "always":
        return case
    # The model three times over: a base is copied before it is prepared or run (``Loaded.copy``), and copies come one at a
    # time: the pristine one, the one under audit, and KB308's copy of it. Float twins read the pristine one's weights.
    need, free = 3 * (case.weights.loaded + case.weights.upcast), free_bytes(spec.device)
    large = case.weights.loaded > LARGE_BYTES
    took = audit_seconds(case.weights) if large and spec.device == "cpu" else 0.0
    if need > free:
        where = "memory" if spec.device == "cpu" else spec.device
        case.why = f"a full audit takes about {need / 1e9:.3g} GB and {free / 1e9:.3g} GB of {where} are free"
    elif took > seconds:
        minutes = f"{took / 60:.0f} minutes on a CPU"
        case.why = f"a full audit takes about {minutes}, which `--timeout {2 * took:.0f}` allows for"
    else:
        return None
    return case
