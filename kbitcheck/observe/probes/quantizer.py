"""What was requested of a model's quantization, and what transformers and a preparation do with its method."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import ModelFacts, QuantizerFacts
from kbitcheck.core.methods import Loading, Treatment
from kbitcheck.models.methods import loading
from kbitcheck.observe.probes.treatment import PEFT, peft_function, treatment

HALF_BYTES = 2


def of_model(model: Any, quant: str, facts: ModelFacts) -> QuantizerFacts:
    """Of a loaded model: what its own quantizer says."""
    quantizer = getattr(model, "hf_quantizer", None)
    answer = None
    if quantizer is not None:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "")
        unpacked = Quantization.parse(quant).backend.unpacked_by
        answer = Loading(method=_plain(method), unpacked=unpacked, trainable="yes" if quantizer.is_trainable else "no")
    return _facts(Quantization.parse(quant), facts, answer, None)


def of_checkpoint(described: Mapping[str, Any], spec: CaseSpec, facts: ModelFacts) -> QuantizerFacts:
    """Of a model without weights: what transformers says of a ``quantization_config``; by default of the spec's own."""
    quant = Quantization.parse(spec.quant)
    config = dict(described)
    if not config:
        with suppress(Exception):  # a method that cannot quantize on load has no configuration
            config = quant.config().to_dict()
            config["quant_method"] = _plain(config["quant_method"])
    if not config:
        return _facts(quant, facts, None, None)
    peft = peft_function() if PEFT.match(spec.implementation) else None
    return _facts(quant, facts, loading(config), treatment(peft, config) if peft else None)


def _unpacks(buffer: str, facts: ModelFacts) -> bool:
    """Whether a buffer is part of a packed weight, which plain numbers do without."""
    stacks = tuple(f"{name}_" for name, layer in facts.layers.items() if layer.stack)
    return buffer.rpartition(".")[0] in facts.layers or buffer.startswith(stacks)


def _plain(method: Any) -> str:
    """The text of a method's name, which may be a member of an enumeration."""
    return str(getattr(method, "value", method))


def _facts(quant: Quantization, facts: ModelFacts, answer: Loading | None, treated: Treatment | None) -> QuantizerFacts:
    stays = bool(quant.backend.unpacked_by)  # what is unpacked is packed again when it is saved
    packed = {t.storage: t.nbytes for t in facts.parameters.values() if t.packed}
    packed |= {t.storage: t.nbytes for t in facts.buffers.values() if _unpacks(t.name, facts) and not stays}
    numbers = sum(layer.in_features * layer.out_features for layer in facts.layers.values())
    unpacked = facts.nbytes - sum(packed.values()) + HALF_BYTES * numbers
    return QuantizerFacts(
        scheme=quant.scheme,
        skip=quant.skip,
        loading=answer,
        treatment=treated,
        packed=facts.nbytes,
        unpacked=unpacked,
    )
