"""KB6xx: what preparing itself costs."""

from collections.abc import Iterable

from kbitcheck.core.anatomy import norm_parameters
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import HALF, Facts
from kbitcheck.core.profile import PROMISES
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule

LARGE_BLOCK = 20 << 20


@rule("KB601", "peak-bounded", Level.SHOULD)
def peak_bounded(facts: Facts) -> Iterable[Observation]:
    """Peak memory of preparation is at most the memory before, plus the upcast's bytes, plus the largest parameter.

    Why: a model that fits and could be trained may still run out of memory in preparation.
    Symptom: out of memory inside ``param.data.to(torch.float32)``.
    Fix: cast one parameter at a time, and free its old storage before the next.
    Sources: bitsandbytes#1569, peft#1142.
    """
    c = facts.cost
    bound = c.before + max(c.after - c.before, 0) + c.largest
    yield Observation("peak", f"at most {bound:,} bytes", f"{c.peak:,} bytes", ok=c.peak <= bound)


@rule("KB602", "cache-returned", Level.SHOULD)
def cache_returned(facts: Facts) -> Iterable[Observation]:
    """After preparation, the accelerator's allocator holds no large block of freed half-precision weights.

    Why: on a small GPU, or with unified memory, a gigabyte that is reserved and unused decides whether training fits.
    Symptom: right after preparation, reserved memory is well above allocated memory.
    Fix: empty the allocator's cache once, after all casts.
    Sources: peft#3265, peft#3293.
    """
    cached = facts.cost.cached
    if cached is None:
        raise NotApplicable("no accelerator: the CPU allocator keeps no cache")
    limit = f"below {LARGE_BLOCK:,} bytes"
    yield Observation("the allocator's cache", limit, f"{cached:,} bytes", ok=cached < LARGE_BLOCK)


@rule("KB603", "upcast-only-what-is-promised", Level.MUST)
def upcast_only_what_is_promised(facts: Facts) -> Iterable[Observation]:
    """Preparation adds no byte beyond the casts that its profile demands.

    Why: a weight that is copied, cast to float64 or held twice costs its memory in every run.
    Symptom: a prepared model that is larger than its parameters in fp32.
    Fix: cast the parameters that the profile names, to float32, in place.
    Sources: peft#1149, trl#4335, unsloth#1186.
    """
    before, after = facts.loaded, facts.prepared
    promise, norms = PROMISES[facts.profile], norm_parameters(before)
    cast = [
        tensor
        for tensor in before.parameters.values()
        if not tensor.packed and tensor.dtype in HALF and promise.casts(norm=tensor.name in norms)
    ]
    demanded = sum({tensor.storage: tensor.nbytes for tensor in cast}.values())  # float32 takes twice the bytes
    # A small parameter may be a view of a large storage.
    sizes = {"parameters and buffers": (before.nbytes, after.nbytes), "storages": (facts.cost.before, facts.cost.after)}
    for where, (old, new) in sizes.items():
        bound = old + demanded
        yield Observation(where, f"at most {bound:,} bytes", f"{new:,} bytes", ok=new <= bound)
