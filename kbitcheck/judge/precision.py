"""KB2xx: which numbers may change their dtype, and that nothing else changes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from kbitcheck.core.anatomy import norm_parameters
from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import FLOATING, HALF, Facts, ForwardFacts, TensorFacts
from kbitcheck.core.profile import PROMISES
from kbitcheck.core.recipe import is_low_rank
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import RECAST, unless_bare, unless_unprepared


@rule("KB201", "norms-fp32", Level.MUST)
def norms_fp32(facts: Facts) -> Iterable[Observation]:
    """Every parameter of every normalization layer is fp32, whatever the layer is called (``peft`` and ``qlora``).

    Why: norm scales multiply the whole residual stream; in half precision they round every activation of every token.
    Filters by name silently miss ``ln_f``, ``norm_out`` or ``q_norm``.
    Symptom: "expected scalar type Float but found Half"; a slightly worse loss that nobody can explain.
    Fix: cast every unquantized half-precision parameter, not parameters in a list of names.
    Sources: peft#130, alpaca-lora#313, unsloth-zoo#680.
    """
    _needs_one_recipe(facts)
    if not PROMISES[facts.profile].norms:
        raise NotApplicable(f"the {facts.profile} profile promises nothing about norms")
    names = norm_parameters(facts.prepared)
    if not names:
        raise NotApplicable("the model has no normalization layer with parameters")
    for name in sorted(names):
        dtype = facts.prepared.parameters[name].dtype
        yield Observation(name, "float32", dtype, ok=dtype not in HALF)


@rule("KB202", "unquantized-fp32", Level.MUST)
def unquantized_fp32(facts: Facts) -> Iterable[Observation]:
    """Every other unquantized fp16 or bf16 parameter is fp32: embeddings, head, biases, routers (``peft``).

    Why: the ``peft`` profile promises it. A mixture of dtypes fails at run time, far from the code that caused it.
    Symptom: "expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16".
    Fix: cast every unquantized half-precision parameter, or name the profile that you intend (``--profile qlora``).
    Sources: peft#389, peft#1515.
    """
    _needs_one_recipe(facts)
    if not PROMISES[facts.profile].others:
        raise NotApplicable(f"the {facts.profile} profile lets embeddings and head stay half")
    norms = norm_parameters(facts.prepared)
    for p in facts.prepared.parameters.values():
        read_off = facts.recipe is not None and is_low_rank(p)  # the recipe names the adapters' dtype, KB215 judges it
        layer = facts.prepared.layers.get(p.name.removesuffix(".bias"))
        if p.quantized_bias and layer is not None and layer.fixed:
            continue  # it computes with a bias of one dtype alone
        if not p.packed and p.dtype in FLOATING and p.name not in norms and not read_off:
            half = Observation(p.name, "float32", p.dtype, ok=p.dtype not in HALF)
            yield half if half.ok or not p.quantized_bias else _recast(half, p, facts)


def _recast(half: Observation, bias: TensorFacts, facts: Facts) -> Observation:
    """A quantized layer's half-precision bias: the stack's where the model has run, as its first forward decides the dtype."""
    try:
        _ = facts.loaded
    except Unavailable:  # of a model that is prepared already, and may be in the middle of training
        if bias.adapter:
            return half.attributed(Party.STACK, f"{RECAST}: this bias trains in {bias.dtype}")
        return replace(half, ok=True, note=RECAST)
    return half


def _needs_one_recipe(facts: Facts) -> None:
    if facts.recipe is not None and (facts.recipe.mixed or facts.recipe.towers_differ):
        raise NotApplicable("the dtypes follow no single recipe that could be judged: see KB215")


@rule("KB203", "upcast-exact", Level.MUST)
def upcast_exact(facts: Facts) -> Iterable[Observation]:
    """Every parameter whose dtype changed holds exactly the old values.

    Why: a cast to a wider dtype is exact. Any difference is a detour through another dtype, a swapped tensor or new
    random values.
    Symptom: before any training, the prepared model's loss differs from the base's.
    Fix: ``param.data = param.data.to(torch.float32)``, and nothing else.
    Sources: specification KB203.
    """
    after = facts.prepared.parameters
    kept = [(o, after[name]) for name, o in facts.loaded.parameters.items() if name in after and not o.packed]
    changed = [(old, new) for old, new in kept if old.dtype != new.dtype]
    if not changed:
        raise NotApplicable("no parameter changed its dtype")
    for old, new in changed:
        same = old.value == new.value
        yield Observation.either(old.name, "the old values exactly", f"other numbers in {new.dtype}", ok=same)


@rule("KB204", "unchanged-otherwise", Level.MUST)
def unchanged_otherwise(facts: Facts) -> Iterable[Observation]:
    """Parameters that were fp32, fp64, integer, bool or float8, and every buffer, keep dtype, device and bits.

    Every plain number that a module holds, such as an epsilon, a scale or a dropout rate, stays the same, too.

    Why: scales, rotary tables and weights that are in fp32 on purpose break silently when they are cast or recomputed.
    Symptom: garbage after long contexts; NaN in T5; a kernel that refuses its scales.
    Fix: cast only unquantized fp16 and bf16 parameters; leave buffers alone.
    Sources: specification KB204.
    """
    loaded, prepared = facts.loaded, facts.prepared
    unpacked = [o for o in loaded.parameters.values() if not o.packed]
    kept = [*(o for o in unpacked if o.dtype not in HALF), *loaded.buffers.values()]
    if not kept:
        raise NotApplicable("the model has neither a parameter that is not half-precision nor a buffer")
    after = {**prepared.parameters, **prepared.buffers}
    for old in kept:
        yield _unchanged(old, after.get(old.name))
    for name in sorted(set(after) - set(loaded.parameters) - set(loaded.buffers)):
        yield Observation(name, "no new tensor", "added by preparation", ok=False)
    for old in unpacked:
        if old.dtype in HALF:
            new = prepared.parameters.get(old.name)
            if new is None:
                yield Observation(old.name, "still there", "gone", ok=False)
            elif new.dtype == old.dtype and new.bits != old.bits:
                yield Observation(old.name, "the same bits", "other numbers", ok=False)
    yield from _numbers(facts)


def _numbers(facts: Facts) -> Iterator[Observation]:
    """One observation for each number that a module keeps and that is another."""
    for module in facts.loaded.modules.values():
        now = facts.prepared.modules.get(module.name)
        if now is not None:
            for key, number in module.numbers.items():
                if now.numbers.get(key) != number:
                    yield Observation(f"{module.name}.{key}", str(number), str(now.numbers.get(key)), ok=False)


def _unchanged(old: TensorFacts, new: TensorFacts | None) -> Observation:
    expected = f"{old.dtype} on {old.device}, the same bits"
    if new is None:
        return Observation(old.name, expected, "gone", ok=False)
    same = (old.dtype, old.device, old.bits, old.shape) == (new.dtype, new.device, new.bits, new.shape)
    actual = f"{new.dtype} on {new.device}, {'the same bits' if old.bits == new.bits else 'other bits'}"
    return Observation(old.name, expected, actual, ok=same)


@rule("KB205", "packed-weights-intact", Level.MUST)
def packed_weights_intact(facts: Facts) -> Iterable[Observation]:
    """Packed weights keep class, dtype, shape and bits, whatever dtype they are stored in.

    Why: if ``bnb_4bit_quant_storage`` is bf16 or fp16, packed bytes look like ordinary half-precision weights, and an
    upcast destroys them. A check by class name misses subclasses, and the cast destroys those.
    Symptom: "shape '[128, 32]' is invalid for input of size 8192"; output that is noise.
    Fix: skip packed parameters by ``isinstance`` or by their quantization state, never by class name.
    Sources: peft#1550, peft#1614.
    """
    packed, after = facts.loaded.packed, {**facts.prepared.buffers, **facts.prepared.parameters}
    if not packed:
        raise NotApplicable("the model has no packed weight")
    for old in packed.values():
        new = after.get(old.name)
        if new is None:
            yield Observation(old.name, f"{old.cls} {old.dtype}", "gone", ok=False)
            continue
        kept = ("cls", "dtype", "shape", "bits")
        differs = [k for k in kept if getattr(old, k) != getattr(new, k)]
        actual = f"{new.cls} {new.dtype}" + (f"; changed: {', '.join(differs)}" if differs else "")
        yield Observation(old.name, f"{old.cls} {old.dtype}, the same bits", actual, ok=not differs)


@rule("KB206", "quant-state-intact", Level.MUST)
def quant_state_intact(facts: Facts) -> Iterable[Observation]:
    """The quantization state (absmax, code, block size, type, nested state, offset; the int8 scales) is the same.

    Each quantized layer also unpacks to the same numbers as before.

    Why: a lost nested state or a slightly wrong scale changes every weight of a layer, without an error.
    Symptom: "FP4 quantization state not initialized"; a base that answers worse after preparation.
    Fix: never rebuild or move packed parameters in preparation; a new ``Params4bit`` loses its state.
    Sources: accelerate#3983, transformers#23839, bitsandbytes#1310.
    """
    prepared = facts.prepared.layers
    for old in facts.loaded.layers.values():
        new = prepared.get(old.name)
        if new is None:
            continue  # KB207 tells
        for field, digest in old.state.items():
            same = new.state.get(field) == digest
            yield Observation.either(f"{old.name}.{field}", "the same", "changed", ok=same)
        # What another module multiplies may be read in float32, as that module's other weights are.
        same = new.compute == old.compute or (not old.multiplies and new.compute == "float32")
        yield Observation(f"{old.name}.compute_dtype", old.compute, new.compute, ok=same)
        same = new.dequantized == old.dequantized
        yield Observation.either(f"{old.name} (unpacked)", "the same numbers", "other numbers", ok=same)


@rule("KB207", "still-quantized", Level.MUST)
def still_quantized(facts: Facts) -> Iterable[Observation]:
    """No quantized layer was replaced, dequantized or dropped.

    Why: a dequantized layer costs four times its memory, and the adapter is trained on other numbers.
    Symptom: memory above what the model card says; ``lora.Linear`` where ``lora.Linear4bit`` was expected.
    Fix: leave quantized modules in place.
    Sources: specification KB207.
    """
    prepared = facts.prepared.layers
    for old in facts.loaded.layers.values():
        new = prepared.get(old.name)
        same = new is not None and (new.cls, new.scheme) == (old.cls, old.scheme)
        actual = "not quantized" if new is None else f"{new.cls} ({new.scheme})"
        yield Observation(old.name, f"{old.cls} ({old.scheme})", actual, ok=same)


@rule("KB208", "ties-kept", Level.MUST)
def ties_kept(facts: Facts) -> Iterable[Observation]:
    """Parameters that shared memory still share it, such as tied embeddings and head.

    Why: replacing one of two tied parameters makes two copies: twice the memory, and a head that no longer equals
    the embedding.
    Symptom: a model that grows by the size of its embedding; "Some tensors share memory" errors on saving that come
    or go.
    Fix: assign ``param.data``; never ``module.weight = nn.Parameter(...)``.
    Sources: peft#1750, peft#2777, transformers#45127.
    """
    before, after = facts.loaded.ties(), facts.prepared.ties()
    if not before:
        raise NotApplicable("the model ties no parameters")
    for group in sorted(before, key=sorted):
        kept = any(group <= other for other in after)
        yield Observation.either(" = ".join(sorted(group)), "one tensor", "separate tensors", ok=kept)


@rule("KB209", "same-function", Level.MUST)
@unless_bare
def same_function(facts: Facts) -> Iterable[Observation]:
    """The prepared model's logits are about as close to the float64 twin's as the base's logits are, within four
    yardsticks.

    Under ``peft`` every unquantized weight is fp32, and the yardstick is the error of a twin with those dtypes.
    Under other profiles the base's own error is added. Tokens that rounding sends to other experts are left out and
    counted.

    Why: preparation may change precision, not the function. A changed scale, mask or attention setting shows here,
    and in no parameter.
    Symptom: the loss at step 0 differs from the base's.
    Fix: change nothing but dtypes, flags and hooks.
    Sources: transformers#45242, unsloth-zoo#813.
    """
    f = facts.function
    if not math.isfinite(f.twin_error) or not math.isfinite(f.base_error):
        raise NotApplicable("the logits of the float twin or of the unprepared base are not finite")
    if f.left_out == f.tokens:
        raise NotApplicable("rounding moved the experts of every token")
    bound = 4 * max(f.twin_error, f.ulp) + (0 if PROMISES[facts.profile].others else f.base_error)
    rounds_inputs = any(layer.rounds_input for layer in facts.base.layers.values())
    for forward in facts.forwards:
        if forward.apart is not None and not f.left_out:
            # The base and the prepared model are each this far from the twin; modes and masks change little of that.
            # In eval such a layer rounds its input, by as much as the base's own logits show against train.
            # Autocast rounds both, each by about as much as the base shows.
            far = f.base_error + max(f.twin_error, f.ulp) + (forward.base_step if rounds_inputs else 0)
            far = 4 * (far + (forward.base_cast + facts.half_ulp if forward.autocast else 0))
            where, expected = f"logits ({forward.condition})", f"within {far:.2e} of the base's"
            yield Observation(where, expected, f"off by {forward.apart:.2e}", ok=forward.apart <= far)
    left = f"; {f.left_out} of {f.tokens} tokens left out, their experts changed" if f.left_out else ""
    expected = f"relative error at most {bound:.2e} (the base's: {f.base_error:.2e})"
    yield Observation("logits", expected, f"{f.error:.2e}{left}", ok=f.error <= bound)


@rule("KB210", "runs-everywhere", Level.MUST)
def runs_everywhere(facts: Facts) -> Iterable[Observation]:
    """The forward is finite and raises nothing in train and eval mode, with and without mask and autocast; a
    training step runs.

    Inputs with padding on the left, embeddings instead of token ids, and single tokens with a cache are judged as
    well, if the unprepared base accepts them. Under ``qlora`` only forwards under autocast are judged, because
    mixed dtypes raise without it in many architectures.

    Why: mixed dtypes work in training under autocast, and fail in ``generate``, evaluation and callbacks.
    Symptom: "expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16".
    Fix: cast all unquantized half-precision parameters, or none.
    Sources: peft#84, peft#88, peft#131, peft#1515, trl#4457.
    """
    for f in facts.forwards:
        if PROMISES[facts.profile].autocast and not f.autocast:
            continue
        forward = _forward(f)
        if not forward.ok and (f.base_raised or not f.base_finite):
            yield forward.attributed(Party.MODEL, f"the unprepared base: {f.base_raised or 'not finite either'}")
        elif f.raised and f.wide_raised == f.raised:
            yield forward.attributed(Party.MODEL, "the same model in float32, not quantized at all, does the same")
        else:
            # The inputs of the unprepared base require grad too, which some models cannot bear.
            yield unless_unprepared(forward, facts, Party.MODEL, partial(_fails_so, f))
    raised = facts.step_raised
    if facts.cut.towers and not raised:
        f = facts.evaluation
        yield unless_unprepared(_forward(f), facts, Party.MODEL, lambda base: _same_failure(f, base.evaluation))
    step = Observation("training step", "no error", str(raised or "none"), ok=not raised).of(raised)
    yield unless_unprepared(step, facts, Party.MODEL, lambda base: base.step_raised == raised)


def _fails_so(forward: ForwardFacts, facts: Facts) -> bool:
    return any(_same_failure(forward, f) for f in facts.forwards)


def _forward(f: ForwardFacts) -> Observation:
    actual, ok = str(f.raised or "not finite"), f.finite and not f.raised
    return Observation(f"forward ({f.condition})", "finite, no error", actual, ok=ok).of(f.raised)


def _same_failure(one: ForwardFacts, other: ForwardFacts) -> bool:
    return (one.condition, one.raised, one.finite) == (other.condition, other.raised, other.finite)


@rule("KB211", "trainables-not-fp16", Level.MUST)
def trainables_not_fp16(facts: Facts) -> Iterable[Observation]:
    """No trainable parameter is fp16: the gradient scaler refuses it.

    Why: gradients of fp16 parameters cannot be unscaled.
    Symptom: "ValueError: Attempting to unscale FP16 gradients."
    Fix: keep adapters in fp32, or bf16.
    Sources: peft#341, peft#1249, transformers#23165.
    """
    trainable = [p for p in facts.wrapped.parameters.values() if p.requires_grad]
    if not trainable:
        raise NotApplicable("no parameter is trainable")
    for p in trainable:
        yield Observation(p.name, "not float16", p.dtype, ok=p.dtype != "float16")


@rule("KB212", "one-device", Level.MUST)
def one_device(facts: Facts) -> Iterable[Observation]:
    """Every tensor stays on its device, none moves to the meta device, and tied parameters share a device.

    Why: a tensor on another device, or on the meta device, fails in the middle of the first step.
    Symptom: "Cannot copy out of meta tensor; no data!"; "Expected all tensors to be on the same device".
    Fix: cast in place; move nothing.
    Sources: qlora#186, peft#414, alpaca-lora#368.
    """
    after = {**facts.prepared.parameters, **facts.prepared.buffers}
    for old in [*facts.loaded.parameters.values(), *facts.loaded.buffers.values()]:
        new = after.get(old.name)
        if new is not None:
            yield Observation(old.name, old.device, new.device, ok=new.device == old.device)
    for group in facts.prepared.ties():
        devices = {facts.prepared.parameters[n].device for n in group}
        yield Observation(" = ".join(sorted(group)), "one device", ", ".join(sorted(devices)), ok=len(devices) == 1)
