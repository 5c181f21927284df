"""KB801, KB806 to KB810: an adapter that was saved, alone and beside its base."""

import re
from collections.abc import Iterable, Mapping
from math import prod

from kbitcheck.core.anatomy import group_of, norm_parameters
from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import Facts, ModelFacts
from kbitcheck.core.facts.adapter import SavedAdapter, SavedLayer
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
    modules = [layer.of_base for layer in adapter.layers.values() if not layer.whole]
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
    yield Observation("reach", "told", "told", ok=True, note=f"it reaches {_reach(modules, base)}")


def _names(target: str, module: str) -> bool:
    """Whether a target names a module, or a parameter of it."""
    return any(module == name or module.endswith(f".{name}") for name in (target, target.rpartition(".")[0]) if name)


def _reach(modules: Iterable[str], base: ModelFacts) -> str:
    """The share of the base's weights in these modules, and of each group that has any weight to speak of."""
    reached, norms = set(modules), norm_parameters(base)
    every: dict[str, list[int]] = {}
    for parameter in {p.storage: p for p in reversed(list(base.parameters.values()))}.values():
        count = every.setdefault(group_of(parameter, base, norms), [0, 0])
        size = prod(parameter.shape)
        count[1] += size
        count[0] += size if parameter.name.rpartition(".")[0] in reached else 0
    total = [sum(column) for column in zip(*every.values(), strict=True)]
    shares = {"of the weights": total, **{name: c for name, c in every.items() if c[1] > 0.01 * total[1]}}
    texts = [f"{c[0] / c[1]:.0%} {name}" for name, c in shares.items()]
    return f"{texts[0]} ({', '.join(texts[1:])})"


@rule("KB806", "adapter-moved", Level.MUST, about="adapter")
def adapter_moved(facts: Facts) -> Iterable[Observation]:
    """The adapter is not what it was at its start: of the tensors that start at zero, some are not zero.

    Why: an adapter at its start changes nothing, and a run that never moved it looks alive: losses are logged, files are written.
    Symptom: the model answers as its base does.
    Fix: look at the run with ``kbitcheck watch``: its optimizer held other parameters, or its learning rate was zero.
    Sources: trl#6701, peft#3415, LoRA#156.
    """
    seen = _that_tell(facts.adapter)
    alive = sum(bool(layer.moved) for layer in seen)
    parts = sorted({part for layer in seen for part in layer.tensors if part in facts.adapter.starts})
    where = f"{', '.join(parts)} of {len(seen)} layer{'s' * (len(seen) > 1)}"
    yield Observation.either(where, "moved away from zero in some layer", "zero in all of them", ok=alive > 0)


@rule("KB807", "every-layer-moved", Level.SHOULD, about="adapter")
def every_layer_moved(facts: Facts) -> Iterable[Observation]:
    """Each layer of the adapter moved, and of a stack of experts each expert.

    Why: layers that no gradient reached, or that the optimizer did not hold, are stored like the others.
    Symptom: an adapter that does less than its size says.
    Fix: ``kbitcheck watch`` names layers without gradients or updates; experts that no token reached need more data.
    Sources: open-unlearning#178.
    """
    seen = _that_tell(facts.adapter)
    if not any(layer.moved for layer in seen):
        raise NotApplicable("none moved: KB806 says so")
    for layer in seen:
        still = f"zero in experts {', '.join(map(str, layer.still))}" if layer.still else "zero"
        ok = bool(layer.moved) and not layer.still
        yield Observation.either(layer.module, "moved away from zero", still, ok=ok)


def _that_tell(adapter: SavedAdapter) -> list[SavedLayer]:
    """The layers of which the file says whether they moved."""
    if not adapter.starts:
        raise NotApplicable(f"cannot be told: {adapter.cannot_tell}")
    seen = [layer for layer in adapter.layers.values() if layer.moved is not None]
    if not seen:
        raise NotApplicable(NO_LAYERS)
    return seen


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
        yield Observation(layer.module or "shared", "tensors", "tensors", ok=True)


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
            yield Observation(layer.module, f"a module of {base.cls}", "no such module", ok=False)
            continue
        for part, sizes in _sizes(layer).items():
            possible = weights.get(layer.of_base, set())
            actual = f"{part} for a weight of {' by '.join(map(str, sorted(sizes)))}"
            expected = f"a weight of {' or '.join(sorted(' by '.join(map(str, sorted(p))) for p in possible))}"
            yield Observation(layer.module, expected, actual, ok=not possible or sizes in possible)
        yield Observation(layer.module, "a module", "a module", ok=True)


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
    for name, error in merge.errors.items():
        expected = f"less than the {merge.effect:.2%} that the adapter does"
        yield Observation(name, expected, f"logits off by {error:.2%}", ok=error < merge.effect)
