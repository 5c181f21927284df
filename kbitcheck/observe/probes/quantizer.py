"""What was requested of a model's quantization, and what transformers and a preparation do with its method."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import ModelFacts, QuantizerFacts
from kbitcheck.core.methods import Loading, Treatment
from kbitcheck.models.internals import renaming, skip_list
from kbitcheck.models.methods import loading, matching
from kbitcheck.observe.probes.treatment import PEFT, peft_function, treatment

HALF_BYTES = 2
LINEAR = ("Linear", "Conv1D")


def of_model(model: Any, quant: str, facts: ModelFacts) -> QuantizerFacts:
    """Of a loaded model: what its own quantizer says."""
    quantizer = getattr(model, "hf_quantizer", None)
    answer = None
    if quantizer is not None:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "")
        unpacked = Quantization.parse(quant).backend.unpacked_by
        answer = Loading(method=_plain(method), unpacked=unpacked, trainable="yes" if quantizer.is_trainable else "no")
    seen = _facts(Quantization.parse(quant), facts, answer, None)
    return replace(seen, packed=0, unpacked=facts.nbytes) if answer is not None and answer.unpacked else seen


def of_checkpoint(described: Mapping[str, Any], spec: CaseSpec, facts: ModelFacts, model: Any) -> QuantizerFacts:
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
    seen = _facts(quant, facts, loading(config), treatment(peft, config) if peft else None)
    return replace(seen, **_left_out(described, facts, model)) if described else seen


def _left_out(described: Mapping[str, Any], facts: ModelFacts, model: Any) -> dict[str, Any]:
    """What a checkpoint's own list leaves out, and what transformers makes of it."""
    names, matches = skip_list(model, described), matching()
    if not names or matches is None:
        return {}
    linear = [n for n, module in facts.modules.items() if module.cls in LINEAR or n in facts.layers]
    rename = renaming(model)
    renamed = [rename(f"{name}.weight")[0].removesuffix(".weight") for name in names] if rename else []
    left_out = {name: next((each for each in names if matches(each, name)), "") for name in linear}
    return {"listed": tuple(dict.fromkeys([*names, *renamed])), "left_out": left_out}


def _unpacks(buffer: str, facts: ModelFacts) -> bool:
    """Whether a buffer is part of a packed weight, which plain numbers do without."""
    stacks = tuple(f"{name}_" for name, layer in facts.layers.items() if layer.stack)
    return buffer.rpartition(".")[0] in facts.layers or buffer.startswith(stacks)


def _plain(method: Any) -> str:
    """The text of a method's name, which may be a member of an enumeration."""
    return str(getattr(method, "value", method))


def _facts(quant: Quantization, facts: ModelFacts, answer: Loading | None, treated: Treatment | None) -> QuantizerFacts:
    stays = bool(quant.backend.unpacked_by)  # what is unpacked is packed again when it is saved
    packed = {t.storage: t.nbytes for t in facts.packed.values()}
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
