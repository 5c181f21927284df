"""A case that is judged without weights: its facts are sizes, shapes and types."""

from collections.abc import Iterator, Mapping
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.anatomy import norm_parameters
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import HALF, Fact, ForecastFacts, ModelFacts, QuantizerFacts, StoredFacts
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.profile import PROMISES
from kbitcheck.models.sources.config import Config
from kbitcheck.models.sources.source import Source
from kbitcheck.models.stored import ON_LOAD, stored_without_numbers
from kbitcheck.observe.forecast import fitting, predict
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import snapshot
from kbitcheck.observe.probes.quantizer import of_checkpoint
from kbitcheck.observe.recipe import as_loaded

NEEDS_A_RUN = "needs a run: the audit is static"


def promised_bytes(base: ModelFacts, profile: str) -> Mapping[str, int]:
    """Bytes that a profile adds to each parameter that it casts."""
    norms, promise = norm_parameters(base), PROMISES[profile]
    return {
        name: t.nbytes
        for name, t in base.parameters.items()
        if not t.packed and t.dtype in HALF and promise.casts(norm=name in norms)
    }


def _described(source: Source, spec: CaseSpec) -> Mapping[str, Any]:
    """The ``quantization_config`` of the checkpoint that the audit is of; empty where it is of an unquantized one."""
    if not isinstance(source, Config) or source.leaves_aside(Quantization.parse(spec.quant)):
        return {}
    return source.described


def _of_method(
    source: Source, spec: CaseSpec, quantizer: QuantizerFacts, described: Mapping[str, Any]
) -> Iterator[str]:
    """What a checkpoint that is quantized already is, and whether it trains."""
    own = getattr(source, "foreign", "")
    if not own and not described:
        own = str(getattr(source, "described", {}).get("quant_method", ""))
    if own:
        yield f"its own {own} quantization is not verified, sizes are those of {spec.quant}"
    if not described or quantizer.loading is None:
        return
    method = quantizer.loading.method
    if quantizer.loading.unpacked:
        yield f"the checkpoint is {method}, which {quantizer.loading.unpacked} turns into plain numbers on this machine"
    yield {
        "yes": f"transformers trains {method}",
        "no": f"transformers does not train {method}",
    }.get(quantizer.loading.trainable, f"whether transformers trains {method} {quantizer.loading.trainable}")


def _stored(source: Source, spec: CaseSpec, model: Any) -> StoredFacts | Unavailable:
    """What became of the packed weights that lie beside a configuration, or why that cannot be said."""
    folder = getattr(source, "folder", None)
    if folder is None or spec.quant != source.quant:
        return Unavailable(ON_LOAD)
    try:
        return stored_without_numbers(model, folder)
    except Unavailable as gap:
        return gap


class StaticCase(OpenCase):
    """Facts of a model on the meta device. What needs a run is not applicable; ``weights`` is the forecast without steps."""

    def __init__(self, spec: CaseSpec, source: Source) -> None:
        self._source = source
        self._model: Any = source.meta(Quantization.parse(spec.quant))
        self.base = snapshot.snapshot(self._model)
        described = _described(source, spec)
        self.quantizer = of_checkpoint(described, spec, self.base, self._model)
        spec = as_loaded(spec, self.base, self.quantizer.treatment)
        super().__init__(spec)
        self.why = "; ".join(["no weights were read", *_of_method(source, spec, self.quantizer, described)])
        self.remote_code = source.remote_code
        self._trained = self._unpacked() if described else self.base
        self.weights = predict.of_weights(self._model, self._trained, spec, source.notes)
        self._stored = _stored(source, spec, self._model)  # before a predicted step takes the model's layers away
        wanted = adapter_probe.target_layers(self._model, spec.targets) if self.base.takes_adapters else []
        self.unfit_targets = adapter_probe.unfit(self._model, wanted)

    def compute(self, name: str) -> Any:
        raise Unavailable(NEEDS_A_RUN)

    def _unpacked(self) -> ModelFacts:
        """The facts of what trains: another model than the checkpoint's where something unpacks it for good."""
        backend = Quantization.parse(self.spec.quant).backend
        if not backend.unpacked_by:
            return self.base
        backend.unpack(self._model)
        return snapshot.snapshot(self._model)

    @Fact
    def forecast(self) -> ForecastFacts:
        return fitting.with_steps(self.weights, self._source, self._model, self._trained, self.spec)

    @Fact
    def stored(self) -> StoredFacts:
        if isinstance(self._stored, Unavailable):
            raise self._stored
        return self._stored

    @Fact
    def widened(self) -> Mapping[str, int]:
        return promised_bytes(self.base, self.profile)

    def summary(self) -> dict[str, Any]:
        """Facts for the head and the memory table of a report."""
        forecast = self.forecast if "forecast" in self.computed else self.weights
        others = {t.storage: t.nbytes for t in self.base.parameters.values() if not t.packed}
        left_out = self.budget.as_json() if self.budget is not None else {}
        return {
            **({"left_out": left_out} if left_out else {}),
            "static": self.why,
            "model_class": self.base.cls,
            "parameters": forecast.parameters,
            "quantized": sum(layer.in_features * layer.out_features for layer in self.base.layers.values()),
            "unquantized_bytes": sum(others.values()),
            "bytes_loaded": forecast.loaded,
            "bytes_prepared": forecast.loaded + forecast.upcast,
            "forecast": forecast.as_json(),
        }
