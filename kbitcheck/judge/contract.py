"""KB214 and KB5xx: what a caller may rely on."""

from collections.abc import Iterable, Iterator
from functools import partial

from kbitcheck.core.conditions import LATER, TURNS, has_turn
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import CallFacts, CallForm, Changes, Facts, ModelFacts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import unless_unprepared

DEFAULTS = {"use_gradient_checkpointing": "True", "gradient_checkpointing_kwargs": "None"}


@rule("KB214", "quantization-marks-kept", Level.MUST)
def quantization_marks_kept(facts: Facts) -> Iterable[Observation]:
    """What libraries dispatch on is as before: ``is_quantized``, ``quantization_method``, ``hf_quantizer`` and the like, and
    ``config.quantization_config``. More attributes are fine.

    Why: by these the adapter library chooses the class of its layers, and a trainer how it saves, moves and wraps the model.
    Symptom: adapters of the wrong class; a trainer that refuses the model, or casts its packed weights.
    Fix: change the model's parameters and flags, and none of its attributes.
    Sources: specification KB214.
    """
    after = facts.prepared.marks
    if not facts.loaded.marks:
        raise NotApplicable("the model has no attributes of its own")
    for name, value in facts.loaded.marks.items():
        now = after.get(name, "absent")
        yield Observation(name, value, now, ok=now == value)


@rule("KB501", "signature", Level.MUST)
def signature(facts: Facts) -> Iterable[Observation]:
    """The function accepts ``(model)``, ``(model, bool)`` and its three parameters by name, with defaults ``True``
    and ``None``.

    Why: trainers call it in all these ways.
    Symptom: "got an unexpected keyword argument 'gradient_checkpointing_kwargs'".
    Fix: ``prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None)``; more keywords are
    fine.
    Sources: peft#1036, peft#1583, MiniGPT-4#526.
    """
    call = facts.call
    if call.parameters is not None:
        for name, default in DEFAULTS.items():
            declared = call.parameters.get(name)
            if declared is None:
                actual = "any keyword" if call.accepts_any else "absent"
                yield Observation(name, f"a parameter, default {default}", actual, ok=call.accepts_any)
            else:
                actual = f"default {declared or 'missing'}"
                yield Observation(name, f"default {default}", actual, ok=declared == default)
        order = [n for n in call.parameters if n in DEFAULTS]
        ordered = order in (list(DEFAULTS), order[:1], [])
        yield Observation("order of parameters", ", ".join(DEFAULTS), ", ".join(order), ok=ordered)
        first = next(iter(call.parameters), None)
        yield Observation("first parameter", "model", first or "none", ok=first == "model" or call.accepts_any)
    off, was_on = facts.positional_call, any(block.checkpointing for block in facts.base.blocks)
    stays_off = off.raised is not None or was_on or not off.checkpoints
    yield Observation("prepare(model, False)", "checkpointing stays off", "it is on", ok=stays_off)
    calls: dict[str, CallFacts | CallForm] = {
        "prepare(model)": facts.default_call,
        "prepare(model, False)": facts.positional_call,
        **facts.call_forms,
    }
    for text, one in calls.items():
        raised = one.raised
        refused = (
            raised is not None
            and (facts.base.can_checkpoint or text == "prepare(model, False)")
            # If every form of call raises the same error, the signature is not to blame.
            and (raised != facts.call.raised or raised.type == "TypeError")
        )
        yield Observation.either(text, "accepted", f"raised {one.raised}", ok=not refused)


@rule("KB502", "returns-the-model", Level.MUST)
def returns_the_model(facts: Facts) -> Iterable[Observation]:
    """The function returns the model object that it received, and does not change its class.

    Why: callers go on with either reference; if the result is a copy, one of them is not prepared.
    Symptom: changes that seem to be lost; twice the memory.
    Fix: change the model in place and return it.
    Sources: specification KB502.
    """
    call = facts.call
    if call.raised:
        yield Observation("prepare(model, ...)", "returns", f"raised {call.raised}", ok=False)
        return
    actual = "the same object" if call.same_object else f"another object ({call.returned})"
    yield Observation("returned object", f"the {facts.base.cls} it was given", actual, ok=call.same_object)
    for text, one in (("prepare(model)", facts.default_call), ("prepare(model, False)", facts.positional_call)):
        if not one.raised and not one.same_object:
            yield Observation(text, f"the {facts.base.cls} it was given", f"another object ({one.returned})", ok=False)
    yield Observation("class", f"the very class {facts.base.cls}", facts.prepared.cls, ok=call.class_kept)


@rule("KB503", "arguments-untouched", Level.MUST)
def arguments_untouched(facts: Facts) -> Iterable[Observation]:
    """The caller's ``gradient_checkpointing_kwargs`` is not changed.

    Why: several calls and the trainer often share one dictionary.
    Symptom: a second model that is prepared differently from the first.
    Fix: copy the dictionary before you add defaults.
    Sources: trl#3981, specification KB503.
    """
    checkpoints = facts.checkpointing != "off" and facts.base.can_checkpoint
    calls = [facts.call, facts.honoured.call] if checkpoints else [facts.call]
    passed = [call for call in calls if not call.kwargs_before == "None" == call.kwargs_after]
    if not passed:
        raise NotApplicable("this case passes no kwargs")
    for call in passed:
        same = call.kwargs_before == call.kwargs_after
        yield Observation("gradient_checkpointing_kwargs", call.kwargs_before, call.kwargs_after, ok=same)


@rule("KB504", "idempotent", Level.SHOULD)
def idempotent(facts: Facts) -> Iterable[Observation]:
    """A second preparation changes nothing: no flag, dtype, hook or byte.

    Why: a script and the trainer that it uses may both prepare the model.
    Symptom: hooks that pile up; "'CastOutputToFloat' object has no attribute 'weight'".
    Fix: before each change, check whether it is there already.
    Sources: peft#373, trl#3926.
    """
    yield from same_model(facts.repeated, facts.prepared_again, "after the first call", "after the second")


@rule("KB505", "one-hook-and-removable", Level.SHOULD)
def one_hook_and_removable(facts: Facts) -> Iterable[Observation]:
    """Each embedding has at most one input-grad hook, and none after ``disable_input_require_grads()``;
    checkpointing can be undone.

    Why: ``enable_input_require_grads`` never removes an earlier hook. A second call leaves the first hook on the
    model for good, and every evaluation then builds a graph.
    Symptom: memory in evaluation; a model that cannot be pickled.
    Fix: let transformers set the hook, or remove the earlier one first.
    Sources: peft#2299; transformers ``enable_input_require_grads``.
    """
    before = facts.loaded.modules
    hooks = {name: len(module.hooks) for name, module in before.items()}
    hooked = {n: m for n, m in facts.prepared.modules.items() if n not in facts.prepared.heads}
    for name, module in hooked.items():
        added = len(module.hooks) - hooks.get(name, 0)
        if added or name in facts.prepared.embeddings:
            yield Observation(name or module.cls, "at most one new hook", f"{added} new hooks", ok=added <= 1)
    for name, module in facts.switched_off.modules.items():
        left = len(module.hooks) - hooks.get(name, 0)
        if name in hooked and (left or name in facts.prepared.embeddings):
            yield Observation(f"{name or module.cls} after disabling", "no hook left", f"{left} left", ok=left <= 0)
        if module.checkpointing is not None:
            where = f"{name or module.cls} after switching off"
            yield Observation(where, "flag False", f"flag {module.checkpointing}", ok=module.checkpointing is False)


@rule("KB506", "all-or-nothing", Level.SHOULD)
def all_or_nothing(facts: Facts) -> Iterable[Observation]:
    """If preparation raises, because the architecture cannot checkpoint, it leaves the model unchanged.

    The message names the model class and the argument that avoids the error.

    Why: otherwise the next attempt starts from a half-prepared model, frozen and in fp32.
    Symptom: "does not support gradient checkpointing", and afterwards out of memory without it.
    Fix: check before the first change.
    Sources: llm-foundry#399, LLaMA-Factory#1550, peft#1142.
    """
    call, before, after = facts.refused.call, facts.refused.before, facts.refused.after
    if not call.raised:
        warned = bool(call.warnings or call.logged)
        on = any(b.checkpointing for b in after.blocks)
        yield Observation("an architecture that cannot checkpoint", "an error or a warning", "silence", ok=warned or on)
        return
    yield from same_model(before, after, "before the call", "after it raised")
    message = f"{call.raised.type}: {call.raised.text}"
    yield Observation("message", f"names {before.cls}", message, ok=before.cls in message)
    way = "use_gradient_checkpointing" in message
    yield Observation("message (way out)", "names use_gradient_checkpointing=False", message, ok=way)


@rule("KB507", "no-global-effects", Level.MUST)
def no_global_effects(facts: Facts) -> Iterable[Observation]:
    """Default dtype, grad mode, random states, autocast, warning filters and the libraries' classes are as before.

    Why: a global change made for one model affects every other model in the process.
    Symptom: results that depend on the order of imports; another seed, another dtype, a patched ``forward``.
    Fix: change the model and nothing else; use no random numbers.
    Sources: unsloth-zoo#549, ms-swift ``torch.utils.checkpoint`` patch.
    """
    yield Observation("process", "unchanged", "looked at", ok=True)
    for name, (before, after) in facts.call.process.items():
        yield Observation(name, before, after, ok=False)


@rule("KB508", "tensors-released", Level.MUST)
def tensors_released(facts: Facts) -> Iterable[Observation]:
    """No tensor outlives its use: old half-precision storages are freed, and no activation survives a step.

    Why: a second copy of each upcast weight costs half of the model again; an activation that stays is a leak in
    every step.
    Symptom: more memory after preparation than the model needs; memory that grows with every step.
    Fix: keep no list of old parameters or outputs; detach a tensor that must be kept.
    Sources: bitsandbytes#2005, peft#3265.
    """
    stale = facts.cost.stale
    yield Observation("after preparing", "0 bytes of old weights alive", f"{stale:,} bytes", ok=stale == 0)
    survivors, left = facts.memory.survivors, facts.left_by_evaluation
    # What the base leaves in half precision a preparation may leave in fp32: twice the bytes, and no more.
    none = "0 bytes of activations alive"
    step = Observation("after a step", none, f"{survivors:,} bytes", ok=survivors == 0)
    yield unless_unprepared(step, facts, Party.MODEL, lambda base: 2 * base.memory.survivors >= survivors)
    evaluation = Observation("after an evaluation", none, f"{left:,} bytes", ok=left == 0)
    yield unless_unprepared(evaluation, facts, Party.MODEL, lambda base: 2 * base.left_by_evaluation >= left)
    if has_turn(facts.conditions, facts.seed, LATER, TURNS):
        kept = facts.later.kept
        many = Observation("after many steps", none, f"{kept:,} bytes", ok=kept == 0)
        yield unless_unprepared(many, facts, Party.MODEL, lambda base: 2 * base.later.kept >= kept)


@rule("KB509", "no-warnings", Level.SHOULD)
def no_warnings(facts: Facts) -> Iterable[Observation]:
    """On a supported stack, preparation causes no deprecation or user warning.

    Why: such warnings hide the warnings that matter.
    Symptom: a FutureWarning on every preparation.
    Fix: call the method that the installed transformers documents.
    Sources: specification KB509; transformers ``gradient_checkpointing_enable``.
    """
    yield Observation("prepare", "no warning", "; ".join(facts.call.warnings) or "none", ok=not facts.call.warnings)


@rule("KB510", "saves-and-loads", Level.MUST)
def saves_and_loads(facts: Facts) -> Iterable[Observation]:
    """State-dict keys are unchanged; reloaded adapters, and the reloaded model if its base can be saved, give the same logits.

    Why: wrapped or renamed modules train well and cannot be loaded.
    Symptom: "Some weights were not initialized"; another model after reloading.
    Fix: wrap no module, and keep all names.
    Sources: peft#602, trl#4081, transformers#45743.
    """
    s = facts.store
    yield Observation.either("keys", "all the base's", f"missing: {', '.join(s.missing[:5])}", ok=not s.missing)
    yield Observation.either("keys", "no others", f"new: {', '.join(s.unexpected[:5])}", ok=not s.unexpected)
    if s.base_raised:
        base = Observation("save and reload of the base", "no error", str(s.base_raised), ok=False)
        yield base.of(s.base_raised).attributed(Party.STACK, "the unprepared base cannot be saved and reloaded either")
    unsaved = {f.base_raised for f in facts.forwards if f.base_raised}
    saved = Observation("save and reload", "no error", str(s.raised or "none"), ok=not s.raised).of(s.raised)
    if s.raised in unsaved:
        yield saved.attributed(Party.MODEL, f"the unprepared base, never saved, raises the same: {s.raised}")
    else:
        yield unless_unprepared(saved, facts, Party.STACK, lambda base: base.store.raised == s.raised)
    if s.logits is not None:
        actual = "the same" if s.logits.equal else f"off by {s.logits.relative:.2e}"
        # The same model in the same dtypes: only the order of a sum may differ.
        ok = s.logits.equal or s.logits.relative <= facts.compute_ulp
        logits = Observation("logits", "the same", actual, ok=ok)
        yield unless_unprepared(logits, facts, Party.STACK, _reloads_otherwise)


def _reloads_otherwise(facts: Facts) -> bool:
    logits = facts.store.logits  # NaN, which no comparison holds for, shows nothing
    return logits is not None and not logits.equal and logits.relative > facts.compute_ulp


@rule("KB511", "config-kept", Level.SHOULD)
def config_kept(facts: Facts) -> Iterable[Observation]:
    """``model.config`` is unchanged, except for ``use_cache``.

    Why: the config is saved with the adapter and read by the next loader.
    Symptom: a reloaded model in another dtype or with another attention.
    Fix: write nothing to the config.
    Sources: specification KB511.
    """
    before, after = dict(_leaves(facts.loaded.config)), dict(_leaves(facts.prepared.config))
    if not before:
        raise NotApplicable("the model has no config")
    for key in sorted({*before, *after}):
        if not key.endswith("use_cache"):
            same = before.get(key) == after.get(key)
            yield Observation(f"config.{key}", str(before.get(key, "absent")), str(after.get(key, "absent")), ok=same)


@rule("KB512", "deterministic", Level.MUST)
def deterministic(facts: Facts) -> Iterable[Observation]:
    """The same call on the same model gives the same state.

    Why: a run that cannot be repeated cannot be debugged.
    Symptom: two preparations, two losses.
    Fix: use no random numbers, and depend on the arguments alone.
    Sources: specification KB512.
    """
    yield from same_model(facts.first_prepared, facts.repeated, "the first model", "the second")


@rule("KB513", "no-lasting-effect", Level.MUST)
def no_lasting_effect(facts: Facts) -> Iterable[Observation]:
    """Importing the implementation, and training, generating with and saving what it prepared, leave no file, no print, the process as it was.

    Why: what a hook changes in a later step affects every other model in the process, and no look at the preparation sees it.
    Symptom: other models' results change once this one has trained; a program that does not end; a handler that never runs.
    Fix: no threads, timers, signal handlers, seeds, environment variables or patches, neither at import nor in a hook; logs, not prints.
    Sources: specification KB513.
    """
    for moment, changes in _effects(facts).items():
        yield Observation(moment, "the process is as before", "looked at", ok=True)
        for name, (before, after) in changes.items():
            changed = Observation(f"{name}, after {moment}", before, after, ok=False)
            same = partial(_shows_effect, moment, name)
            yield unless_unprepared(changed, facts, Party.MODEL, same)
    seen = {name for changes in (facts.call.process, *_effects(facts).values()) for name in changes}
    for name, (before, after) in facts.lasting.items():
        yield Observation(f"{name}, since the first call", before, after, ok=name in seen)


def _effects(facts: Facts) -> dict[str, Changes]:
    later = {"many steps": facts.later.effects} if has_turn(facts.conditions, facts.seed, LATER, TURNS) else {}
    return {"import": facts.imported, **facts.effects, "saving": facts.store.effects, **later}


def _shows_effect(moment: str, name: str, base: Facts) -> bool:
    return name in _effects(base)[moment]


def same_model(first: ModelFacts, second: ModelFacts, one: str, other: str) -> Iterator[Observation]:
    """One observation for each tensor, module, layer and key that two snapshots share or do not."""
    tensors = [{**model.parameters, **model.buffers} for model in (first, second)]
    for (before, after), kept in (
        (tensors, ("cls", "dtype", "shape", "device", "requires_grad", "bits")),
        ((first.modules, second.modules), ("cls", "training", "checkpointing", "hooks")),
    ):
        for name in sorted({*before, *after}):
            a, b = before.get(name), after.get(name)
            differs = [k for k in kept if getattr(a, k, None) != getattr(b, k, None)]
            actual = f"{other}: not the same {', '.join(differs)}"
            yield Observation.either(name or first.cls, f"as {one}", actual, ok=not differs)
    for name in sorted({*first.layers, *second.layers}):
        same = first.layers.get(name) == second.layers.get(name)
        yield Observation.either(f"{name} (state)", f"as {one}", f"{other}: it differs", ok=same)
    ties = first.ties() == second.ties()
    yield Observation.either("ties", f"as {one}", f"{other}: they differ", ok=ties)


def _leaves(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config
