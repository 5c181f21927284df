"""KB9xx: facts about the model that its user should know before training."""

from collections import Counter
from collections.abc import Iterable
from math import prod

from kbitcheck.core.anatomy import unquantized
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule

MOST = 0.5


def _of_model(where: str, expected: str, actual: str, witness: str, *, ok: bool) -> Observation:
    return Observation(where, expected, actual, ok=ok, party=Party.MODEL, witness=witness)


@rule("KB901", "mostly-quantized", Level.SHOULD)
def mostly_quantized(facts: Facts) -> Iterable[Observation]:
    """Most weights are really quantized; the report names the largest groups that are not.

    Embeddings and head do not count: no backend quantizes them.

    Why: bitsandbytes quantizes ``nn.Linear``; fused mixture-of-experts weights are 3-D parameters, and stay
    unquantized.
    Symptom: a "4-bit" model almost as large as the original; out of memory in preparation.
    Fix: use a checkpoint or loader that quantizes the experts, keep the layers out of preparation's upcast
    (``--profile qlora``), or choose another model.
    Sources: bitsandbytes#1849, bitsandbytes#1965, axolotl#3395.
    """
    if not facts.base.layers and any(tensor.packed for tensor in facts.base.parameters.values()):
        raise NotApplicable(
            "no layer holds its packed weight whole, as under FSDP: how many weights it stands for is not known"
        )
    packed = sum(layer.in_features * layer.out_features for layer in facts.base.layers.values())
    groups = {g: ts for g, ts in unquantized(facts.base).items() if g not in ("embeddings", "head")}
    sizes = {g: sum(prod(t.shape) for t in ts) for g, ts in groups.items()}
    total = packed + sum(sizes.values())
    share = packed / total if total else 0.0
    largest = sorted(sizes, key=lambda g: -sizes[g])
    if share < MOST and largest:
        for tensor in sorted(groups[largest[0]], key=lambda t: t.name):
            actual = f"{tensor.dtype}, {len(tensor.shape)}-D"
            yield _of_model(tensor.name, "packed weights", actual, "its type: no linear layer", ok=False)
    others = ", ".join(f"{g}: {sizes[g]:,}" for g in largest[:3])
    actual = f"{share:.1%} of {total:,}; not quantized: {others or 'none'}"
    yield _of_model("weights", "most weights quantized", actual, "counted on the unprepared base", ok=share >= MOST)


@rule("KB902", "upcast-affordable", Level.SHOULD)
def upcast_affordable(facts: Facts) -> Iterable[Observation]:
    """The prepared model is no larger than the unquantized half-precision model; the report says what the upcast
    adds, by group.

    Why: upcasting embeddings, head or experts to fp32 can cost more memory than quantizing the rest saves.
    Symptom: the prepared model needs more memory than the unquantized one: 81 GB against 73 GB for one mixture of
    experts.
    Fix: use a preparation under ``--profile qlora``, or cast embeddings, head and experts back to half precision.
    Sources: bitsandbytes#1569, trl#4335, peft#816, peft#1149.
    """
    loading = facts.quantizer.loading
    if loading is not None and loading.unpacked:
        raise NotApplicable(
            f"{loading.unpacked} unpacks the weights, so that nothing is saved by quantizing them (KB912)"
        )
    base, widened, groups = facts.base, facts.widened, unquantized(facts.base)
    half = 2 * sum(layer.in_features * layer.out_features for layer in base.layers.values())
    half += sum(t.nbytes for ts in groups.values() for t in ts)
    added = {g: grown for g, ts in groups.items() if (grown := sum(widened.get(t.name, 0) for t in ts))}
    prepared = base.nbytes + sum(added.values())
    parts = ", ".join(f"{g} +{n:,}" for g, n in sorted(added.items(), key=lambda g: -g[1]))
    actual = f"{prepared:,} bytes ({parts or 'nothing added'}); unquantized: {half:,}"
    expected = f"at most {half:,} bytes, the half-precision model's"
    witness = "bytes that the profile demands, counted on the base"
    where = "prepared model, experts upcast" if "experts" in added else "prepared model"
    yield _of_model(where, expected, actual, witness, ok=prepared <= half)


@rule("KB903", "checkpointing-supported", Level.SHOULD)
def checkpointing_supported(facts: Facts) -> Iterable[Observation]:
    """The architecture supports gradient checkpointing; the report names the blocks that do.

    Why: without checkpointing, activations decide what fits, and some preparations raise half-way.
    Symptom: "does not support gradient checkpointing".
    Fix: prepare with ``use_gradient_checkpointing=False``, a shorter sequence or a smaller batch.
    Sources: llm-foundry#399, LLaMA-Factory#1550.
    """
    base = facts.base
    towers = ", ".join(f"{b} blocks of {t}" for t, b in Counter(block.tower for block in base.blocks).items())
    ok = base.can_checkpoint and bool(towers)
    actual = towers or "no block that does"
    yield _of_model(base.cls, "supports checkpointing", actual, "its class and blocks", ok=ok)


@rule("KB904", "adapters-reachable", Level.SHOULD)
def adapters_reachable(facts: Facts) -> Iterable[Observation]:
    """A gradient reaches every adapter target, in the float64 twin without checkpointing.

    Why: an adapter without a gradient is stored and counted as trainable, and never trained; every tool that
    asserts "all adapters have gradients" fails on it.
    Symptom: adapters that keep their initial values; "parameters that were not used in producing loss" under DDP.
    Fix: leave these layers out of the adapter's targets.
    Sources: the last vision layer of LLaVA; experts that no token is routed to; unused cross-attention.
    """
    for name, g in facts.gradients.items():
        actual = "live" if g.live else "dead"
        yield _of_model(name, "reached by a gradient", actual, "the float64 twin", ok=g.live)


@rule("KB905", "targets-supported", Level.SHOULD)
def targets_supported(facts: Facts) -> Iterable[Observation]:
    """Every adapter target is a layer that the adapter library accepts and may wrap.

    Why: an adapter on a router changes which experts run; an adapter beside a weight that the model reads directly
    has no effect.
    Symptom: "Target module is not supported"; a tuple where a tensor was expected.
    Fix: list the targets by name, without these layers.
    Sources: peft#1720, transformers mixture-of-experts routers, Mamba ``out_proj``.
    """
    yield Observation("targets", "fit", "looked at", ok=True)
    for name, reason in facts.unfit_targets.items():
        yield _of_model(name, "can take an adapter", reason, "its type", ok=False)


@rule("KB906", "fits-memory", Level.INFO)
def fits_memory(facts: Facts) -> Iterable[Observation]:
    """The model takes the memory that its configuration predicts, and training fits ``--memory``.

    Predicted are weights, upcast, adapters, optimizer, activations with and without checkpointing, and logits, for
    a batch and length, the peak while loading, and the largest batch that fits ``--memory`` beside what CUDA itself
    takes. If the step does not fit, the report's memory table names the smallest change that makes it fit.

    Why: a run that ends out of memory costs more than a forecast.
    Symptom: "CUDA out of memory" in the first step, or in the first long batch.
    Fix: a smaller batch or length, ``--checkpointing non-reentrant`` if it is not on, ``--profile qlora``, a paged optimizer.
    Sources: bitsandbytes#1569, peft#816.
    """
    forecast = facts.forecast
    predicted = forecast.loaded - sum(g.state for g in forecast.groups.values())
    expected, actual = f"{predicted:,} bytes as loaded", f"{facts.base.nbytes:,} bytes"
    yield _of_model("weights", expected, actual, "its configuration", ok=predicted == facts.base.nbytes)
    if forecast.memory is not None:
        total = forecast.total(forecast.mode)
        if total is None:  # without a step, what stays through training is still known
            where, total, fitting = "weights, adapters and optimizer", forecast.resident, f"no step: {forecast.missing}"
        else:
            where = f"{forecast.batch} x {forecast.seq_len} tokens"
            total = forecast.answer.requested - forecast.overhead if forecast.answer else total
            largest = forecast.largest_batch.get(forecast.memory)
            fitting = f"no search: {forecast.missing}" if largest is None else f"largest batch that fits: {largest:,}"
        room = forecast.memory - forecast.overhead
        expected, witness = f"at most {room:,} bytes", f"predicted, {forecast.mode} checkpointing"
        yield _of_model(where, expected, f"{total:,} bytes; {fitting}", witness, ok=total <= room)
        if forecast.loading is not None and forecast.loading.peak > room:
            actual = f"{forecast.loading.peak:,} bytes; {forecast.loading.how}"
            yield _of_model("while loading", expected, actual, forecast.loading.tensor or "all tensors", ok=False)


@rule("KB907", "norms-recognised", Level.INFO)
def norms_recognised(facts: Facts) -> Iterable[Observation]:
    """Every layer whose shape looks like a norm's is of a class that says so.

    Why: code that finds norms by class misses the others; KB201 counts them as norms.
    Symptom: a norm that stays in half precision.
    Fix: look at each such layer once; there is nothing to mend.
    Sources: unsloth-zoo#680.
    """
    looked = [m for m in facts.base.modules.values() if m.norm]
    if not looked:
        raise NotApplicable("nothing in the model looks like a norm")
    for m in looked:
        yield _of_model(m.name, "a norm class", m.cls, "its shape", ok="class" in m.norm)


@rule("KB908", "no-remote-code", Level.INFO)
def no_remote_code(facts: Facts) -> Iterable[Observation]:
    """The model's code is part of transformers; code from its repository runs only with ``--trust-remote-code``.

    Why: such code runs with your rights.
    Symptom: "requires you to execute the configuration file in that repo".
    Fix: read the code, then pass ``--trust-remote-code`` with a pinned ``--revision``.
    Sources: transformers documentation.
    """
    expected, actual = "part of transformers", "from its repository"
    yield _of_model("model code", expected, actual, "auto_map in its config", ok=not facts.remote_code)
