"""KB810: a saved adapter beside the structure of its base."""

from collections.abc import Iterable, Iterator, Mapping

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, ModelFacts
from kbitcheck.core.facts.adapter import SavedLayer
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule

NO_LAYERS = "it stores no layer of the base"
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks for which PEFT puts a head of its own on the base


@rule("KB810", "adapter-fits-base", Level.MUST, about="adapter")
def adapter_fits_base(facts: Facts) -> Iterable[Observation]:
    """The base has every module that the adapter stores something for, with weights of the size that the adapter needs.

    Why: what the base lacks is left out when the adapter is loaded, with a warning at most.
    Symptom: "unexpected keys"; the model answers as its base does.
    Fix: load the adapter on the base, and with the release of transformers, that it was trained with.
    Sources: gpt-oss-recipes#21, qlora#278.
    """
    base, weights = facts.base, _weights(facts.base)
    layers = [layer for layer in facts.adapter.layers.values() if layer.module]
    if not layers:
        raise NotApplicable(NO_LAYERS)
    for layer in layers:
        if layer.of_base not in base.modules:
            head = facts.adapter.task in HEADS and all(tensor.trains for tensor in layer.tensors.values())
            actual = f"a head of {facts.adapter.task}" if head else f"no such module{_near(layer.of_base, base)}"
            yield Observation(layer.module, f"a module of {base.cls}", actual, ok=head)
            continue
        resized = _resized(layer, base)
        if resized:
            note = f"{layer.of_base} has {resized:,} rows: resize_token_embeddings({resized}) before it is loaded"
            yield Observation(layer.module, "rows for every token", f"{resized:,} rows", ok=True, note=note)
            continue
        for part, sizes in _sizes(layer).items():
            possible = set() if layer.gathered else weights.get(layer.of_base, set())
            actual = f"{part} for a weight of {_by(sorted(sizes))}"
            expected = f"a weight of {' or '.join(sorted(_by(sorted(p)) for p in possible))}"
            yield Observation(layer.module, expected, actual, ok=not possible or sizes in possible)
        yield from _replacing(layer, base)
        renamed = "the base has some of its modules under other names than the file, where transformers 5 and PEFT put its adapters"
        yield Observation(layer.module, "a module", "a module", ok=True, note=renamed if layer.placed else "")


def _near(path: str, base: ModelFacts) -> str:
    """The base's module whose path differs in parts that one of both has in addition, as wrappers and renamed towers do."""
    parts = path.split(".")

    def near(other: str) -> bool:
        own = other.split(".")
        return own[-1] == parts[-1] and (set(own) <= set(parts) or set(own) >= set(parts))

    return next((f"; the base has {name}" for name in base.modules if near(name)), "")


def _replacing(layer: SavedLayer, base: ModelFacts) -> Iterator[Observation]:
    """Whether the base has each tensor whose place a stored one takes, with its shape."""
    for tensor in layer.replacing:
        own = base.parameters.get(f"{layer.of_base}.{tensor.of_base}")
        if own is None:
            yield Observation(tensor.key, f"a tensor of {base.cls}", "no such tensor", ok=False)
        elif tensor.rows is not None:
            actual = f"one in row {max(tensor.rows, default=0):,}"
            fits = max(tensor.rows, default=0) < own.shape[0] and tensor.shape[1:] == own.shape[1:]
            yield Observation(tensor.key, f"tokens of {own.shape[0]:,} rows of {_by(own.shape[1:])}", actual, ok=fits)
        elif "float" in tensor.dtype:  # packed weights have shapes of their own
            yield Observation(tensor.key, _by(own.shape), _by(tensor.shape), ok=tensor.shape == own.shape)


def _resized(layer: SavedLayer, base: ModelFacts) -> int:
    """The rows of an embedding or a head to which tokens were added; 0 for any other layer, and where the base has enough rows."""
    own = base.parameters.get(f"{layer.of_base}.weight")
    if own is None or layer.of_base not in {*base.embeddings, *base.heads}:
        return 0
    whole = layer.tensors.get("weight")
    if whole is not None and whole.shape[1:] == own.shape[1:] and whole.shape[0] > own.shape[0]:
        return whole.shape[0]
    return 0


def _by(shape: Iterable[int]) -> str:
    return " by ".join(map(str, shape))


def _weights(base: ModelFacts) -> Mapping[str, set[frozenset[int]]]:
    """By module, the numbers of rows and columns of its matrices, whichever way they lie; those of a stack are its experts'."""
    sizes: dict[str, set[frozenset[int]]] = {}
    for parameter in base.parameters.values():
        if len(parameter.shape) >= 2:
            owner = parameter.name.rpartition(".")[0]
            sizes.setdefault(owner, set()).add(frozenset(parameter.shape[-2:]))
    return sizes


def _sizes(layer: SavedLayer) -> Mapping[str, frozenset[int]]:
    """The rows and columns that low-rank factors add to."""
    if layer.rank is None:
        return {}
    for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if first in layer.tensors and len(layer.tensors[first].shape) == 2:
            return {first: frozenset((layer.tensors[first].shape[1], layer.tensors[second].shape[0]))}
    return {}
