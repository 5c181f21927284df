"""KB801, KB806 to KB810: an adapter that was saved, alone and beside its base."""

import re
from collections.abc import Iterable, Mapping
from math import prod

from kbitcheck.core.anatomy import group_of, norm_parameters
from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import Facts, ModelFacts
from kbitcheck.core.facts.adapter import Replacement, SavedAdapter, SavedLayer
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule

RESTORED = 2.0**-21  # four roundings of float32
NO_LAYERS = "it stores no layer of the base"


@rule("KB801", "targets-match", Level.SHOULD, about="adapter")
def targets_match(facts: Facts) -> Iterable[Observation]:
    """Each target that the adapter's configuration asks for has a layer in the adapter; where the base is at hand, the share of its
    weights that the adapter reaches is told, by group.

    Why: a name that matches nothing is silently left out, and what was meant to train does not.
    Symptom: fewer trainable parameters than expected; a model that hardly learns.
    Fix: name modules of this model, as ``model.named_modules()`` lists them, or ``all-linear``.
    Sources: specification KB801; unsloth#3405, axolotl#3514.
    """
    adapter = facts.adapter
    if not (adapter.asked or adapter.pattern):
        raise NotApplicable("its configuration names no targets")
    layers = [layer for layer in adapter.layers.values() if not layer.whole or any(t.trains for t in layer.replacing)]
    modules = [name for layer in layers for name in dict.fromkeys((layer.stated, layer.of_base))]
    if adapter.pattern:
        some = any(re.fullmatch(adapter.pattern, module) for module in modules)
        yield Observation.either(adapter.pattern, "a layer of the adapter", "none", ok=some)
    for name in adapter.asked:
        some = any(_names(name, module) for module in modules)
        yield Observation.either(name, "a layer of the adapter", "none", ok=some)
    try:
        base = facts.base
    except Unavailable:
        return
    yield Observation("reach", "told", "told", ok=True, note=f"it reaches {_reach(layers, base)}")


def _names(target: str, module: str) -> bool:
    """Whether a target names a module, or a parameter of it."""
    return any(module == name or module.endswith(f".{name}") for name in (target, target.rpartition(".")[0]) if name)


def _reach(layers: Iterable[SavedLayer], base: ModelFacts) -> str:
    """The share of the base's weights that these layers reach, and of each group that has any weight to speak of."""
    norms = norm_parameters(base)
    reached = {layer.of_base for layer in layers if not layer.replaced}
    own = {f"{layer.of_base}.{t.of_base}": t for layer in layers for t in layer.replacing if t.trains}
    every: dict[str, list[int]] = {}
    for parameter in {p.storage: p for p in reversed(list(base.parameters.values()))}.values():
        count = every.setdefault(group_of(parameter, base, norms), [0, 0])
        size = prod(parameter.shape)
        count[1] += size
        tensor = own.get(parameter.name)
        if parameter.name.rpartition(".")[0] in reached or tensor is not None:
            count[0] += size if tensor is None or tensor.rows is None else min(size, prod(tensor.shape))
    total = [sum(column) for column in zip(*every.values(), strict=True)]
    shares = {"of the weights": total, **{name: c for name, c in every.items() if c[1] > 0.01 * total[1]}}
    texts = [f"{c[0] / c[1]:.0%} {name}" for name, c in shares.items()]
    return f"{texts[0]} ({', '.join(texts[1:])})"


@rule("KB806", "adapter-moved", Level.MUST, about="adapter")
def adapter_moved(facts: Facts) -> Iterable[Observation]:
    """The adapter is not what it was at its start: of the tensors that start at zero, some are not zero. Where all that it stores are
    tensors in the place of the base's, some are not the base's; these are compared with ``--base``.

    Why: an adapter at its start changes nothing, and a run that never moved it looks alive: losses are logged, files are written.
    Symptom: the model answers as its base does.
    Fix: look at the run with ``kbitcheck watch``: its optimizer held other parameters, or its learning rate was zero.
    Sources: trl#6701, peft#3415, LoRA#156.
    """
    adapter = facts.adapter
    if adapter.layers and all(layer.replaced for layer in adapter.layers.values()):
        _ = facts.replaced  # why there is none
        whole = _trained_whole(facts)
        if not whole:
            raise NotApplicable("the base has no tensor beside which it could be seen")
        where = f"{len(whole)} tensor{'s' * (len(whole) > 1)} stored whole"
        moved = any(each.rows for each in whole.values())
        yield Observation.either(where, "not the base's, in some", "the base's, in all", ok=moved)
        return
    seen = _that_tell(adapter)
    if not seen:
        raise NotApplicable(_cannot_tell(adapter))
    alive = sum(bool(layer.moved) for layer in seen)
    parts = sorted({part for layer in seen for part in layer.tensors if part in adapter.starts})
    where = f"{', '.join(parts)} of {len(seen)} layer{'s' * (len(seen) > 1)}"
    yield Observation.either(where, "moved away from zero in some layer", "zero in all of them", ok=alive > 0)


@rule("KB807", "every-layer-moved", Level.SHOULD, about="adapter")
def every_layer_moved(facts: Facts) -> Iterable[Observation]:
    """Each layer of the adapter moved, of a stack of experts each expert, and, with ``--base``, each tensor that trains whole.

    Why: layers that no gradient reached, or that the optimizer did not hold, are stored like the others.
    Symptom: an adapter that does less than its size says.
    Fix: ``kbitcheck watch`` names layers without gradients or updates; experts that no token reached need more data.
    Sources: open-unlearning#178.
    """
    adapter = facts.adapter
    seen = _that_tell(adapter)
    replaced = _trained_whole(facts) if any(layer.replacing for layer in adapter.layers.values()) else {}
    if not seen and not replaced:
        raise NotApplicable(_cannot_tell(adapter))
    alive = [bool(layer.moved) for layer in seen] or [each.rows > 0 for each in replaced.values()]
    if not any(alive) and (seen or all(layer.replaced for layer in adapter.layers.values())):
        raise NotApplicable("none moved: KB806 says so")
    for key, each in replaced.items():
        yield Observation.either(key, "moved away from the base's", "the base's", ok=each.rows > 0)
    for layer in seen:
        still = f"zero in experts {', '.join(map(str, layer.still))}" if layer.still else "zero"
        ok = bool(layer.moved) and not layer.still
        yield Observation.either(layer.module, "moved away from zero", still, ok=ok)


def _that_tell(adapter: SavedAdapter) -> list[SavedLayer]:
    """The layers of which the file says whether they moved."""
    return [layer for layer in adapter.layers.values() if layer.moved is not None]


def _cannot_tell(adapter: SavedAdapter) -> str:
    return NO_LAYERS if adapter.starts else f"cannot be told: {adapter.cannot_tell}"


def _trained_whole(facts: Facts) -> Mapping[str, Replacement]:
    """The tensors that trained in the place of the base's, beside these; none where the base's weights are not at hand."""
    trained = {t.key for layer in facts.adapter.layers.values() for t in layer.replacing if t.trains}
    try:
        return {key: each for key, each in facts.replaced.items() if key in trained}
    except Unavailable:
        return {}


@rule("KB808", "adapter-finite", Level.MUST, about="adapter")
def adapter_finite(facts: Facts) -> Iterable[Observation]:
    """Every number of the adapter is finite.

    Why: one number that is not finite spoils every output.
    Symptom: logits of NaN; endless repetitions.
    Fix: go back to an earlier checkpoint, and train on in bf16, or with a gradient scaler that skips overflows.
    Sources: peft#389, trl#618.
    """
    for layer in facts.adapter.layers.values():
        for tensor in layer.tensors.values():
            number = tensor.not_finite
            actual = f"{number:,} number{'s' * (number > 1)} not finite"
            yield Observation.either(tensor.key, "finite", actual, ok=not number)


@rule("KB809", "adapter-whole", Level.MUST, about="adapter")
def adapter_whole(facts: Facts) -> Iterable[Observation]:
    """Each layer has all tensors of its method, they fit each other, and their rank is the one that the configuration states.

    Why: a tensor that is missing is made anew when the adapter is loaded, with a warning at most.
    Symptom: "Some weights were not initialized"; an adapter that behaves otherwise after it was loaded.
    Fix: save the adapter with ``save_pretrained`` from the model that trained, on the rank that has all of it.
    Sources: qlora#278, sentence-transformers#3701.
    """
    adapter = facts.adapter
    if not adapter.layers:
        yield Observation("the file", "some tensor", "none", ok=False)
    for layer in adapter.layers.values():
        needed = [group for group in adapter.required if not layer.whole and set(group) & set(layer.tensors)]
        for group in needed:
            lacking = [part for part in group if part not in layer.tensors]
            yield Observation.either(layer.module, " and ".join(group), f"no {', '.join(lacking)}", ok=not lacking)
        if layer.rank is not None and layer.asked is not None:
            actual = f"rank {layer.rank}"
            yield Observation(layer.module, f"rank {layer.asked}", actual, ok=layer.rank == layer.asked)
        for tensor in layer.replacing:
            if tensor.rows is not None:
                expected, actual = f"{len(tensor.rows):,} rows, as tokens that train", f"{tensor.shape[0]:,} rows"
                yield Observation.either(tensor.key, expected, actual, ok=len(tensor.rows) == tensor.shape[0])
        yield Observation(layer.module or "shared", "tensors", "tensors", ok=True)


@rule("KB804", "merge-complete", Level.MUST, about="adapter")
def merge_complete(facts: Facts) -> Iterable[Observation]:
    """Merged into float32 weights, each layer's and each expert's adapter is added once, and unmerging restores the weights.

    Why: a merge that leaves a layer out, or adds one twice, gives a model that nobody trained.
    Symptom: the merged model answers otherwise than the adapter did.
    Fix: keep the adapter beside its base, or merge with another release of PEFT.
    Sources: specification KB804; peft#2710, peft#3411.
    """
    merge = facts.merge
    if not merge.layers:
        raise NotApplicable("no layer could be followed through a merge")
    for layer in merge.layers:
        for index, landed in enumerate(layer.landed):
            expert = f", expert {index}" if len(layer.landed) > 1 else ""
            expected = f"what it adds, within {layer.bound:.2g}"
            yield Observation(
                layer.module + expert, expected, f"{landed:.4g} times that", ok=abs(landed - 1) <= layer.bound
            )
        actual = f"off by {layer.restored:.2g} of the weights"
        yield Observation(layer.module, "restored by unmerging", actual, ok=layer.restored <= RESTORED)
    for one, other in _half_of_a_tie(facts.adapter, facts.base):
        note = f"the base ties {other} to {one}, and the adapter trains one: transformers 4 ties a merged model again when it loads it"
        yield Observation(one, "merged alone", "merged alone", ok=True, note=note)


def _half_of_a_tie(adapter: SavedAdapter, base: ModelFacts) -> Iterable[tuple[str, str]]:
    """The parameters that train whole, each with one that the base ties to it and that does not."""
    whole = {f"{layer.of_base}.{t.of_base}" for layer in adapter.layers.values() for t in layer.replacing if t.trains}
    by_storage = {p.storage: name for name, p in base.parameters.items() if name in whole}
    for name, parameter in base.parameters.items():
        if name not in whole and parameter.storage in by_storage:
            yield by_storage[parameter.storage], name


@rule("KB805", "merge-error", Level.INFO, about="adapter")
def merge_error(facts: Facts) -> Iterable[Observation]:
    """What the adapter does survives a merge: merged, the logits stay closer to those of the float64 twin with the adapter than
    those of the base without it are.

    Why: packed weights are a coarse grid, and what is added to them is rounded away if it is smaller than the grid; the original
    weights are not those that the adapter was trained beside.
    Symptom: the merged model answers as if it was never trained.
    Fix: keep the adapter beside the packed base, or merge it into the unpacked weights (``dequantize()``) and save those.
    Sources: specification KB805; axolotl#3771, unsloth-zoo#810.
    """
    merge = facts.merge
    if not merge.effect:
        raise NotApplicable("it does nothing to the logits of the text that is tried")
    for name, error in merge.errors.items():
        expected = f"less than the {merge.effect:.2%} that the adapter does"
        yield Observation(name, expected, f"logits off by {error:.2%}", ok=error < merge.effect)
