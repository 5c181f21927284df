"""KB9xx: facts about the model that its user should know before training."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from kbitcheck.core.anatomy import unquantized
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, ModelFacts, TensorFacts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule

MOST = 0.5


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
    packed = sum(layer.in_features * layer.out_features for layer in facts.base.layers.values())
    groups = {
        g: sum(prod(t.shape) for t in ts)
        for g, ts in unquantized(facts.base).items()
        if g not in ("embeddings", "head")
    }
    total = packed + sum(groups.values())
    share = packed / total if total else 0.0
    largest = ", ".join(f"{g}: {n:,}" for g, n in sorted(groups.items(), key=lambda g: -g[1])[:3])
    for tensor in _largest(facts.base) if share < MOST else ():
        yield Observation(
            tensor.name,
            "packed weights",
            f"{tensor.dtype}, {len(tensor.shape)}-D",
            ok=False,
            party=Party.MODEL,
            witness="its type: no linear layer",
        )
    yield Observation(
        "weights",
        "most weights quantized",
        f"{share:.1%} of {total:,}; not quantized: {largest or 'none'}",
        ok=share >= MOST,
        party=Party.MODEL,
        witness="counted on the unprepared base",
    )


def _largest(model: ModelFacts) -> list[TensorFacts]:
    """The parameters of the largest group that could have been quantized."""
    groups = [ts for g, ts in unquantized(model).items() if g not in ("embeddings", "head")]
    return sorted(max(groups, key=lambda ts: sum(prod(t.shape) for t in ts), default=[]), key=lambda t: t.name)


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
    base, widened = facts.base, facts.widened
    half = 2 * sum(layer.in_features * layer.out_features for layer in base.layers.values())
    half += sum(t.nbytes for ts in unquantized(base).values() for t in ts)
    added = {g: grown for g, ts in unquantized(base).items() if (grown := sum(widened.get(t.name, 0) for t in ts))}
    prepared = base.nbytes + sum(added.values())
    parts = ", ".join(f"{g} +{n:,}" for g, n in sorted(added.items(), key=lambda g: -g[1]))
    actual = f"{prepared:,} bytes ({parts or 'nothing added'}); unquantized: {half:,}"
    yield Observation(
        "prepared model",
        f"at most {half:,} bytes, the half-precision model's",
        actual,
        ok=prepared <= half,
        party=Party.MODEL,
        witness="bytes that the profile demands, counted on the base",
    )


@rule("KB903", "checkpointing-supported", Level.SHOULD)
def checkpointing_supported(facts: Facts) -> Iterable[Observation]:
    """The architecture supports gradient checkpointing; the report names the blocks that do.

    Why: without checkpointing, activations decide what fits, and some preparations raise half-way.
    Symptom: "does not support gradient checkpointing".
    Fix: prepare with ``use_gradient_checkpointing=False``, a shorter sequence or a smaller batch.
    Sources: llm-foundry#399, LLaMA-Factory#1550.
    """
    towers = ", ".join(f"{b} blocks of {t}" for t, b in _towers(facts.base).items())
    ok = facts.base.can_checkpoint and bool(towers)
    yield Observation(
        facts.base.cls,
        "supports checkpointing",
        towers or "no block that does",
        ok=ok,
        party=Party.MODEL,
        witness="its class and blocks",
    )


def _towers(model: ModelFacts) -> dict[str, int]:
    counts: dict[str, int] = {}
    for block in model.blocks:
        counts[block.tower] = counts.get(block.tower, 0) + 1
    return counts


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
        yield Observation(
            name,
            "reached by a gradient",
            "dead" if not g.live else "live",
            ok=g.live,
            party=Party.MODEL,
            witness="the float64 twin",
        )


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
        yield Observation(name, "can take an adapter", reason, ok=False, party=Party.MODEL, witness="its type")


@rule("KB906", "fits-memory", Level.INFO)
def fits_memory(facts: Facts) -> Iterable[Observation]:
    """The model takes the memory that its configuration predicts, and training fits ``--memory``.

    Predicted are weights, upcast, adapters, optimizer, activations with and without checkpointing, and logits, for
    a batch and length; and the largest batch that fits ``--memory``. The report's memory table shows them.

    Why: a run that ends out of memory costs more than a forecast.
    Symptom: "CUDA out of memory" in the first step, or in the first long batch.
    Fix: a smaller batch or length, ``--checkpointing non-reentrant``, ``--profile qlora``, a paged optimizer.
    Sources: bitsandbytes#1569, peft#816.
    """
    forecast = facts.forecast
    predicted = forecast.loaded - sum(g.state for g in forecast.groups.values())
    yield Observation(
        "weights",
        f"{predicted:,} bytes as loaded",
        f"{facts.base.nbytes:,} bytes",
        ok=predicted == facts.base.nbytes,
        party=Party.MODEL,
        witness="its configuration",
    )
    if forecast.memory is not None:
        total = forecast.total(forecast.mode)
        if total is None:  # without a step, what stays through training is still known
            where, total, fitting = "weights, adapters and optimizer", forecast.resident, f"no step: {forecast.missing}"
        else:
            where = f"{forecast.batch} x {forecast.seq_len} tokens"
            fitting = f"largest batch that fits: {forecast.largest_batch[forecast.memory]:,}"
        yield Observation(
            where,
            f"at most {forecast.memory:,} bytes",
            f"{total:,} bytes; {fitting}",
            ok=total <= forecast.memory,
            party=Party.MODEL,
            witness=f"predicted, {forecast.mode} checkpointing",
        )


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
        yield Observation(m.name, "a norm class", m.cls, ok="class" in m.norm, party=Party.MODEL, witness="its shape")


@rule("KB908", "no-remote-code", Level.INFO)
def no_remote_code(facts: Facts) -> Iterable[Observation]:
    """The model's code is part of transformers; code from its repository runs only with ``--trust-remote-code``.

    Why: such code runs with your rights.
    Symptom: "requires you to execute the configuration file in that repo".
    Fix: read the code, then pass ``--trust-remote-code`` with a pinned ``--revision``.
    Sources: transformers documentation.
    """
    yield Observation(
        "model code",
        "part of transformers",
        "from its repository",
        ok=not facts.remote_code,
        party=Party.MODEL,
        witness="auto_map in its config",
    )
