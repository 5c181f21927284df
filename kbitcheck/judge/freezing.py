"""KB1xx: what is frozen stays frozen, what should train does."""

from collections.abc import Iterable

from kbitcheck.core.facts import Facts, ModelFacts
from kbitcheck.core.facts.model import BASES
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import RECAST, REPACKED, unless_bare
from kbitcheck.judge.gradients import live_gradients

NOTHING_TRAINS = "nothing trains: adapters are off, or were loaded without is_trainable=True"


@rule("KB101", "base-frozen", Level.MUST)
def base_frozen(facts: Facts) -> Iterable[Observation]:
    """After preparation no base parameter requires grad.

    With ``--freezes at-attach``, the rule is judged after adapters are attached.

    Why: a trainable base parameter costs a gradient and two optimizer states in fp32, and moves away from the weights
    that the adapter will be used with later.
    Symptom: "trainable params" far above the adapter's size; out of memory in the first optimizer step; an adapter that
    is worse after reloading than in training.
    Fix: set ``requires_grad = False`` on every parameter of the base before anything else. If a part is meant to
    train, say so: ``assert_prepared(model, trains=["v_head"])``.
    Sources: peft#2299, peft#85, trl#402; specification KB101.
    """
    model = facts.wrapped if facts.freezes == "at-attach" else facts.prepared
    for p in model.parameters.values():
        if not p.adapter:
            yield Observation.either(p.name, "frozen", "requires grad", ok=not p.requires_grad)


@rule("KB102", "only-adapters-train", Level.MUST)
def only_adapters_train(facts: Facts) -> Iterable[Observation]:
    """After adapters are attached, exactly the adapters' parameters are trainable, each layer's own, and what the caller says trains.

    To the adapters belong the base's biases that their configuration trains (``bias="all"``). Two layers whose base is tied may
    share an adapter, and all layers may, as vector banks are shared.

    Why: adapter libraries freeze the base a second time, which hides a preparation that did not freeze it. A
    preparation that intervenes while adapters are attached can freeze the adapters, too. What two layers share gets the sum of
    both gradients, and fits neither.
    Symptom: "trainable params: 0"; or a checkpoint that is as large as the model.
    Fix: freeze the base once, in preparation, and leave adapters alone. Load an adapter with ``is_trainable=True`` to
    train it. If another part is meant to train, say so: ``assert_prepared(model, trains=["v_head"])``.
    Sources: trl#3926, unsloth#3327, unsloth#2343, trl#402.
    """
    trained = [p for p in facts.wrapped.parameters.values() if p.adapter]
    if trained and not any(p.requires_grad for p in trained):
        yield Observation("adapters", "trainable", NOTHING_TRAINS, ok=False)
        return
    for p in facts.wrapped.parameters.values():
        expected, otherwise = ("trainable", "frozen") if p.adapter else ("frozen", "trainable")
        yield Observation.either(p.name, expected, otherwise, ok=p.requires_grad is p.adapter)
    for names in _shared(facts.wrapped):
        yield Observation(" = ".join(names), "one for each layer", "one tensor", ok=False)


def _shared(model: ModelFacts) -> Iterable[list[str]]:
    """The names of what adapters of several layers share, though neither their bases are tied nor all layers share it."""
    layers = {name: model.adapted(name) for name in model.adapters}
    for group in model.ties():
        names = sorted(name for name in group if layers.get(name))
        own = {layers[name] for name in names}
        if len(own) < 2 or len({_tied_to(model, layer) for layer in own}) == 1:
            continue
        part = names[0].removeprefix(layers[names[0]])
        having = {layer for name, layer in layers.items() if name == layer + part}
        if len(own) < len(having) or len(own) == 2:
            yield names


def _tied_to(model: ModelFacts, layer: str) -> frozenset[int]:
    """The storages of the base under an adapter."""
    bases = tuple(f"{layer}.{base}." for base in BASES)
    return frozenset(p.storage for name, p in model.parameters.items() if name.startswith(bases) and not p.adapter)


@rule("KB103", "no-base-grad", Level.MUST)
def no_base_grad(facts: Facts) -> Iterable[Observation]:
    """After a backward, no base parameter holds a ``.grad``.

    Why: a gradient of the base costs memory even if no optimizer reads it.
    Symptom: memory grows by the size of the model in the first backward.
    Fix: freeze every base parameter. To make inputs require grad, hook the embedding's output; never call
    ``requires_grad_`` on the embedding's weight.
    Sources: specification KB103; peft#80.
    """
    held = {*facts.run.base_grads, *(n for n, p in facts.wrapped.parameters.items() if p.has_grad)}
    for p in facts.wrapped.parameters.values():
        if not p.adapter:
            yield Observation.either(p.name, "no gradient", "a gradient", ok=p.name not in held)


@rule("KB104", "base-unchanged-by-training", Level.MUST)
def base_unchanged_by_training(facts: Facts) -> Iterable[Observation]:
    """After a few optimizer steps, every base tensor, packed weight, quantization state and buffer has the same
    bits as before.

    The optimizer is AdamW with weight decay. A quantized layer's own bias, which bitsandbytes casts in place in its
    forward, must equal the old value rounded once to the compute dtype.

    Why: a base that changes in training is not the base that the adapter will be loaded on.
    Symptom: good loss in training, bad answers after the adapter is merged or reloaded.
    Fix: keep base parameters out of the optimizer; change no weight in hooks. Where bitsandbytes repacks weights in eval mode, evaluate
    in train mode without dropout, or on a copy.
    Sources: specification KB104; bitsandbytes ``Linear4bit.forward`` casts ``bias.data`` in place.
    """
    before, after = facts.wrapped, facts.trained
    repacked = {
        f"{name}.weight"
        for name, layer in after.layers.items()
        if layer.laid_out_before and layer.laid_out_before == before.parameters[f"{name}.weight"].bits
    }
    for old in [*before.parameters.values(), *before.buffers.values()]:
        if old.adapter:
            continue
        new = after.parameters.get(old.name) or after.buffers.get(old.name)
        if new is None:
            yield Observation(old.name, "still there", "gone", ok=False)
        elif old.quantized_bias and new.dtype != old.dtype:
            rounded = facts.bias_after_forward.get(old.name, {}).get(new.dtype)
            same, actual = new.bits == rounded, f"{new.dtype}, other numbers"
            yield Observation(old.name, "the old value rounded once", actual, ok=same, note=RECAST)
        else:
            actual = f"{old.dtype} became {new.dtype}" if new.dtype != old.dtype else "other numbers"
            seen = Observation.either(old.name, "the same bits", actual, ok=new.bits == old.bits)
            yield seen.attributed(Party.STACK, REPACKED) if old.name in repacked else seen
    for name, layer in before.layers.items():
        after_layer = after.layers.get(name)
        same = after_layer is not None and after_layer.state == layer.state
        seen = Observation(f"{name} (state)", "the same quantization state", "it changed", ok=same)
        yield seen.attributed(Party.STACK, REPACKED) if f"{name}.weight" in repacked else seen


@rule("KB105", "adapters-do-change", Level.MUST)
@unless_bare
def adapters_do_change(facts: Facts) -> Iterable[Observation]:
    """After a few optimizer steps, every live adapter has changed.

    Why: if gradients belong to one tensor and the optimizer holds another, both work and nothing is trained.
    Symptom: a loss that falls because of a trainable head alone; ``lora_B`` all zero in the saved adapter.
    Fix: keep parameter objects; change ``.data``, and never replace modules after adapters are attached.
    Sources: ai-toolkit#1054, peft troubleshooting "Training runs but the model does not improve".
    """
    for name in live_gradients(facts):
        yield Observation.either(name, "changed by training", "unchanged", ok=name in facts.updated)


@rule("KB106", "prepared-adapter-model-kept", Level.SHOULD)
def prepared_adapter_model_kept(facts: Facts) -> Iterable[Observation]:
    """Preparing a model that already has adapters keeps them trainable or raises; it never silently freezes them.

    Why: freezing "every parameter" of a PeftModel freezes the adapters too, and nothing fails: the input hook gives the
    loss a graph, the backward succeeds, and no parameter ever moves.
    Symptom: "trainable params: 0"; a loss that does not move; no error at all.
    Fix: recognise adapter layers by the adapter library's type and leave them unchanged, or raise.
    Sources: trl#3926, trl#4029, trl#4081, transformers#26098, peft#1253.
    """
    call, before, kept = facts.adapters_first.call, facts.adapters_first.before, facts.adapters_first.after
    if call.raised:
        yield Observation("preparing a model with adapters", "kept or refused", f"raised {call.raised}", ok=True)
        return
    for name in sorted(before):
        yield Observation.either(name, "still trainable", "silently frozen", ok=name in kept)
