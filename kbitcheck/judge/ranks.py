"""KB728: what the processes of a watched run hold, compared."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, Replica
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule

ALONE = "one process was watched, or several that exchange nothing: `kbitcheck watch -- torchrun ...` compares those that train together"


@rule("KB728", "ranks-hold-the-same", Level.MUST)
def ranks_hold_the_same(facts: Facts) -> Iterable[Observation]:
    """Processes that train one model hold the same trained tensors, bit by bit, before each step; what is sharded is not compared.

    Buffers may differ. A run that averages weights now and then (local SGD) drifts apart in between: ignore the rule there.

    Why: DistributedDataParallel makes tensors alike once, as it wraps them, and averages the gradients of those alone. One that it
    leaves out, a rank that skips a step, or a forward past the wrap: each rank trains another model, nothing raises, and rank 0's is saved.
    Symptom: losses that drift apart between ranks; a checkpoint that is worse than the loss said, and hangs on which rank saved it.
    Fix: attach adapters before the wrap; call the wrap and not its ``module``; take every step on every rank.
    Sources: torch documentation of ``DistributedDataParallel``; specification KB728.
    """
    together: dict[tuple[int, ...], list[Replica]] = defaultdict(list)
    for replica in facts.watched.replicas:
        together[replica.peers].append(replica)
    several = [sorted(replicas, key=lambda r: r.rank) for replicas in together.values() if len(replicas) > 1]
    if not several:
        raise NotApplicable(ALONE)
    if not any(replica.steps[-1] for replicas in several for replica in replicas):
        raise NotApplicable("what trains is sharded: no rank holds a whole tensor that another one holds, too")
    for replicas in several:
        yield from _compared(replicas)
    if all(len(replica.steps) < 2 for replicas in several for replica in replicas):
        raise NotApplicable("ranks were alike before the first step, and no second one was looked at: --steps 2")


def _compared(replicas: Sequence[Replica]) -> Iterator[Observation]:
    """Each tensor of processes that train together, at the first step before which it differs."""
    where = f"rank{'s' if len(replicas) > 1 else ''} {', '.join(str(r.rank) for r in replicas)}"
    names = [{name for step in replica.steps for name in step} for replica in replicas]
    wrapped = any(replica.wrapped for replica in replicas)
    if not wrapped and any(each != names[0] for each in names):
        raise NotApplicable("ranks hold tensors of other names, as stages of a pipeline do")
    missing = len(replicas[0].peers) - len(replicas)
    notes = {
        f"{missing:,} more ranks train with these and were not watched here": missing > 0,
        f"{replicas[0].sharded:,} tensors are sharded, and not compared": replicas[0].sharded > 0,
    }
    note = "; ".join(text for text, there in notes.items() if there)
    steps = list(zip(*(replica.steps for replica in replicas), strict=False))
    for name in sorted(set().union(*names)):
        unlike = next(_unlike(name, replicas, steps), "")
        actual = f"{unlike}{_why(name, replicas)}" if unlike else "equal bits"
        yield Observation(name, f"equal bits on {where}", actual, ok=not unlike, note=note)


def _unlike(name: str, replicas: Sequence[Replica], steps: Sequence[Sequence[dict[str, str]]]) -> Iterator[str]:
    """Which ranks differ from most others, and before which step."""
    for number, each in enumerate(steps, start=1):
        digests = [digests.get(name, "") for digests in each]
        ((usual, _),) = Counter(digests).most_common(1)
        others = [str(replica.rank) for replica, digest in zip(replicas, digests, strict=True) if digest != usual]
        if others:
            yield f"otherwise on rank{'s' if len(others) > 1 else ''} {', '.join(others)} from step {number} on"


def _why(name: str, replicas: Sequence[Replica]) -> str:
    if not any(replica.wrapped for replica in replicas):
        if any(replica.sharded for replica in replicas):
            return ": FSDP holds others, and not it"
        return ": no DistributedDataParallel averages gradients"
    left_out = any(name in replica.leaves_out for replica in replicas)
    return ": DistributedDataParallel does not hold it" if left_out else ""
