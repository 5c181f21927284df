"""KB313, KB703, KB706, KB710, KB715 and KB725: what a training script trains, in which dtypes, and what reaches it."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from kbitcheck.core.anatomy import expert_of
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, Update, WatchedRun, WatchedStep
from kbitcheck.core.profile import PROMISES
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule

MOST_LOST = 0.1
NO_OPTIMIZER = (
    "needs your optimizer (optimizer=, or a Trainer in place of the model) or your training (`kbitcheck watch`)"
)
TOKENS = ".trainable_tokens_"


def run_of(facts: Facts) -> WatchedRun:
    """The watched run, if an optimizer of the caller's took a step in it."""
    if facts.watched.assumed:
        raise NotApplicable(NO_OPTIMIZER)
    if not facts.watched.steps:
        raise NotApplicable("the optimizer took no step")
    return facts.watched


def updates_of(steps: Iterable[WatchedStep]) -> dict[str, list[Update]]:
    """The updates of each tensor, step by step."""
    tensors: dict[str, list[Update]] = {}
    for step in steps:
        for name, update in step.updates.items():
            tensors.setdefault(name, []).append(update)
    return tensors


@rule("KB313", "updates-land", Level.SHOULD)
def updates_land(facts: Facts) -> Iterable[Observation]:
    """What the optimizer computes reaches the weights: of each tensor's updates, its dtype rounds away at most a tenth, and nothing
    is cast to half precision after the optimizer was built.

    Counted are elements whose update is not zero in the same step in float32. What stands still altogether is KB711.
    Without your optimizer the count is a forecast for AdamW, which is noted and never a failure.

    Why: bfloat16 has eight bits of mantissa, and at common learning rates an update is less than half of the last one.
    Symptom: a loss that falls more slowly than with fp32 adapters, or not at all; ``lora_A`` that never moves.
    Fix: keep what trains in float32 and let autocast compute in half precision; or an optimizer with stochastic rounding
    or a float32 copy of the weights.
    Sources: trl#7268, trl#1644, torchao#1124, torchtune#2254.
    """
    low = {n: u for n, u in updates_of(facts.watched.steps).items() if u[0].dtype in ("float16", "bfloat16")}
    if not low and not facts.watched.cast:
        raise NotApplicable("nothing that trains is in half precision")
    for name, before in facts.watched.cast.items():
        dtype = low[name][0].dtype if name in low else "half precision"
        actual = f"{dtype}: it was cast after the optimizer was built"
        yield Observation(name, f"{before}, as the optimizer was built with it", actual, ok=False)
    if not facts.watched.cast and not any(u.wanted for updates in low.values() for u in updates):
        raise NotApplicable("the optimizer updates nothing that is in half precision")
    if facts.watched.assumed:
        yield _forecast(low, facts.watched.assumed)
        return
    rates = [step.rate for step in facts.watched.steps]
    for name, updates in low.items():
        wanted, lost = sum(u.wanted for u in updates), sum(u.lost for u in updates)
        if not wanted:
            continue
        rate = max((u.lands_at for u in updates if u.lands_at), default=None)
        would = f"; nine of ten would land at a learning rate of {rate:.1g}, not {max(rates):.1g}" if rate else ""
        actual = f"{lost / wanted:.0%} of {wanted:,} updates rounded away by {updates[0].dtype}{would}"
        yield Observation(name, f"at most {MOST_LOST:.0%} rounded away", actual, ok=lost <= MOST_LOST * wanted)


def _forecast(tensors: Mapping[str, list[Update]], optimizer: str) -> Observation:
    """What an assumed optimizer would lose, in all tensors; never a failure."""
    each = [update for updates in tensors.values() for update in updates]
    wanted, lost = sum(u.wanted for u in each), sum(u.lost for u in each)
    share = lost / wanted if wanted else 0.0
    rate = max((u.lands_at for u in each if u.lands_at), default=None)
    would = f"; nine of ten would land in every tensor at {rate:.1g}" if rate else ""
    actual = f"forecast: with {optimizer}, {each[0].dtype} would round away {share:.0%} of the updates{would}"
    way_out = "; float32 adapters or stochastic rounding keep them" if share > MOST_LOST else ""
    return Observation("updates", "a forecast", actual, ok=True, note=f"{actual}{way_out} (KB313)")


@rule("KB706", "input-dtypes", Level.INFO)
def input_dtypes(facts: Facts) -> Iterable[Observation]:
    """What enters quantized layers is in half precision, unless the model's recipe upcasts norms.

    What such a recipe costs is a note. The report names the kernel of attention.

    Why: float32 there costs time and memory, and keeps fast kernels of attention away.
    Symptom: steps that are slower than in half precision; "FlashAttention only supports fp16 and bf16".
    Fix: train under autocast, or cast hidden states to the compute dtype behind norms that are in float32.
    Sources: transformers#24262, specification KB706.
    """
    entering = run_of(facts).entering
    if not entering:
        raise NotApplicable("no quantized layer was seen to run in training")
    usual = PROMISES[facts.profile].casts(norm=True)
    for dtype, layers in entering.items():
        half, layer = dtype in ("float16", "bfloat16"), f"{layers} quantized layer{'s' if layers > 1 else ''}"
        note = f"{dtype} enters {layer}, as the recipe has it" if usual and not half else ""
        yield Observation(layer, "half precision", dtype, ok=half or usual, note=note)
    if kernel := facts.watched.attention:
        yield Observation("attention", "any kernel", kernel, ok=True, note=f"attention: {kernel}")


@rule("KB703", "trainer-keeps-it", Level.SHOULD)
def trainer_keeps_it(facts: Facts) -> Iterable[Observation]:
    """Arguments of checkpointing, once passed, are kept when checkpointing is switched on again, or are passed again later.

    Why: a trainer that switches checkpointing on again without arguments replaces them by its defaults.
    Symptom: "Expected to mark a variable ready only once", though ``use_reentrant=False`` was passed to preparation.
    Fix: pass the arguments to the trainer too (``gradient_checkpointing_kwargs``), or switch its own checkpointing off.
    Sources: transformers#28536, trl#480, axolotl#1021.
    """
    calls = run_of(facts).switched_on
    if not calls:
        raise NotApplicable("nothing switched checkpointing on while the run was watched")
    yield Observation("gradient checkpointing", "switched on", f"{len(calls)} times", ok=True)
    for number, (before, call) in enumerate(pairwise(calls), start=2):
        for key, value in before.used.items():
            used = call.used.get(key, "torch's default")
            ok = used == value or any(key in later.passed for later in calls[number - 1 :])
            actual = f"call {number}, which passes none, uses {used}"
            yield Observation(f"{key}={value}", "kept when switched on again", actual, ok=ok)


@rule("KB710", "optimizer-holds-them", Level.MUST)
def optimizer_holds_them(facts: Facts) -> Iterable[Observation]:
    """The optimizer holds every adapter that trains, once, nothing that is frozen, and no tensor beside which a copy trains.

    Why: loss and gradient norm look alive whatever the optimizer holds.
    Symptom: ``lora_B`` all zero after training; a checkpoint equal to the base model.
    Fix: attach adapters once, and build the optimizer after that from the parameters that require grad.
    Sources: trl#6701, ai-toolkit#1054, peft#2353.
    """
    run, tensors = run_of(facts), facts.wrapped.parameters
    for name in sorted(run.adapters):
        trains = name in tensors and tensors[name].requires_grad
        actual = ("held" if name in run.held else "not held") + ("" if trains else ", and frozen")
        yield Observation(name, "trains, and is held by the optimizer", actual, ok=trains and name in run.held)
    for name in sorted(run.held - run.adapters):
        if not tensors[name].requires_grad:
            yield Observation(name, "not in the optimizer, as it is frozen", "in the optimizer", ok=False)
        else:
            copied = name in run.copied
            expected = "frozen: a copy of it is saved" if copied else "trains"
            yield Observation.either(name, expected, "trains in place of its copy", ok=not copied)
    for name, how in run.repeated.items():
        yield Observation(name, "stepped once along each gradient", how, ok=False)
    if run.held and run.foreign:
        note = f"the optimizer also holds {run.foreign:,} tensors of no module of the model that was watched: nothing is said of them"
        yield Observation("optimizer", "holds parameters of the model", "and others", ok=True, note=note)
    if run.taken_in_turns:
        note = f"several optimizers, which step in turns, hold {run.taken_in_turns:,} tensors: each remembers its own steps alone"
        yield Observation("optimizers", "tensors of their own", "the same tensors", ok=True, note=note)
    if not run.held:
        actual = f"{run.foreign:,} tensors that are not the model's"
        yield Observation("optimizer", "holds parameters of the model", actual, ok=False)


@rule("KB715", "held-get-gradients", Level.MUST)
def held_get_gradients(facts: Facts) -> Iterable[Observation]:
    """What the optimizer holds gets a finite gradient that is not zero; what is zero by initialisation, from the second step on.

    What no batch reached is a note: an expert without tokens, where another one beside it has a gradient; a whole vision or audio
    tower. What ran and has no gradient is a fault. A gradient that is zero in twins too, and would not be if each token had a part in
    the loss, is a note: rows of two tokens have nothing to teach queries and keys.
    Tokens that are trained alone (``trainable_token_indices``) need not be in the first batches.
    If adapters in blocks had gradients, some have one in the last steps, too.

    Why: a tensor without a gradient is not trained, and no message says so.
    Symptom: adapters that keep their first values; "None of the inputs have requires_grad=True".
    Fix: see KB301 and KB303; under reentrant checkpointing inputs must require grad, also after a save or an evaluation that took
    hooks off.
    Sources: peft#2880, trl#835, transformers#41993.
    """
    run = run_of(facts)
    steps = [step for step in run.steps if not step.skipped]
    if not steps:
        raise NotApplicable("the gradient scaler skipped every step: KB717")
    frozen = {n for n, p in facts.wrapped.parameters.items() if not p.requires_grad}
    held = {name: updates for name, updates in updates_of(steps).items() if name not in frozen}
    if not held:
        raise NotApplicable("the optimizer holds nothing that trains: KB710")
    all_words = {name: [u.gradient for u in updates] for name, updates in held.items()}
    # What trains in some steps alone, as layers that take turns do, is judged by these.
    words_of = {name: [w for w in words if w != "frozen"] or ["none"] for name, words in all_words.items()}
    waiting = {name: _waits(name, words_of, run.idle) for name, words in words_of.items() if "ok" not in words}
    idle = sorted(set(waiting.values()) - {""})
    shown = ", ".join(idle[:2]) + f" and {len(idle) - 2:,} more" * (len(idle) > 2)
    note = f"no batch of {len(steps)} steps reached {shown}: nothing is said of their adapters; --steps looks at more"
    untaught = "some gradients are zero in twins, too: these tokens and labels have nothing to teach, as a query that attends to one token"
    for name, words in words_of.items():
        unmet = TOKENS in name and "none" not in words  # tokens that train alone, none of which was in a batch
        waits = bool(waiting.get(name))
        zero = name in run.untaught and set(words) == {"zero"}
        if "not finite" in words:
            ok = False
        elif unmet or waits or zero:
            ok = True
        elif len(words) == 1:
            ok = words[0] != "none"
        else:
            ok = "ok" in words
        actual = ", ".join(_once(words))
        yield Observation(
            name, "finite and not zero", actual, ok=ok, note=note if waits and ok else untaught if zero else ""
        )
    yield from _lost(steps, [block.name for block in facts.wrapped.blocks])


def _lost(steps: Iterable[WatchedStep], blocks: Iterable[str]) -> Iterator[Observation]:
    """Steps, up to the last, in which nothing inside a block has a gradient any more, though the loss has one."""
    inside = tuple(f"{block}." for block in blocks)
    words = [
        [(n.startswith(inside), u.gradient not in ("none", "frozen")) for n, u in step.updates.items()]
        for step in steps
    ]
    judged = [
        (n, [got for block, got in each if block], any(got for _, got in each)) for n, each in enumerate(words, 1)
    ]
    had = [n for n, of_blocks, _ in judged if any(of_blocks)]
    for number, of_blocks, others in judged:
        if had and number > had[-1] and of_blocks and others:
            actual = (
                f"none of {len(of_blocks):,} tensors has one; in step {had[-1]} {'all' if len(had) > 1 else 'some'} had"
            )
            yield Observation(f"step {number}", "gradients in blocks", actual, ok=False)


def _waits(name: str, words_of: Mapping[str, list[str]], idle: frozenset[str]) -> str:
    """What no batch reached and holds this tensor; empty if a batch reached it, or if it is an expert and none beside it has a gradient."""
    expert = expert_of(name)
    if expert in idle:
        beside = expert.rpartition(".")[0]
        if any("ok" in words for n, words in words_of.items() if expert_of(n).rpartition(".")[0] == beside):
            return expert
    return min((m for m in idle - {expert} if name.startswith(f"{m}.")), key=len, default="")


def _once(words: Iterable[str]) -> Iterator[str]:
    names = {"ok": "there", "zero": "zero", "none": "no gradient", "not finite": "not finite"}
    return (names[word] for word in dict.fromkeys(words))


# The least scaling that counts: in ten thousand steps at a rate of 1e-3, all in one direction, a pair of rank 64 adds at most
# 64 * 10 * 0.6 times the scaling to an output for inputs of size one; half a step of bfloat16 is 2**-9 of an output of size one.
LEAST = 1e-5


@rule("KB725", "adapters-count", Level.MUST)
def adapters_count(facts: Facts) -> Iterable[Observation]:
    """The number by which an active low-rank adapter multiplies what it adds leaves it a say in what the layer returns.

    Why: an adapter that is scaled to nothing trains as any other, since Adam divides a gradient by its size, and changes no output.
    Symptom: a loss that stays where it was; a model that answers as the base does.
    Fix: set ``lora_alpha`` to about the rank; look for ``scale_layer`` and ``set_scale``.
    Sources: PEFT documentation of ``LoraConfig``; specification KB725.
    """
    scalings = run_of(facts).scalings
    if not scalings:
        raise NotApplicable("no active adapter has a scaling")
    for name, scaling in scalings.items():
        yield Observation(name, f"scaled by {LEAST:g} or more", f"{scaling:.3g}", ok=abs(scaling) >= LEAST)
