"""KB711, KB712, KB724 and KB727: what an optimizer does stays, at a rate that counts, with what it remembers."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, WatchedRun, WatchedStep
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule
from kbitcheck.judge.watched import run_of, updates_of

FULL = 0.5  # of the schedule's peak: below, a learning rate is warming up or running out


def _full_rate(run: WatchedRun) -> list[WatchedStep]:
    """The steps at a learning rate that is not near the schedule's ends."""
    steps = [step for step in run.steps if step.rate and step.rate >= FULL * step.peak]
    if not steps:
        raise NotApplicable("in every step the learning rate was below half of its schedule's peak")
    return steps


@rule("KB711", "weights-move", Level.MUST)
def weights_move(facts: Facts) -> Iterable[Observation]:
    """Every tensor with a gradient moves in one of the steps that are taken at half of the learning rate's peak or more, and what a
    step did is still there when the next begins.

    A float32 tensor whose updates along its gradient (SGD's, and RAdam's first) are all too small for float32 in these steps is a
    note: its gradient may still grow. Weight decay times the learning rate takes less of a weight than a tenth in each step.

    Why: an optimizer that holds other tensors, updates that are all rounded away, and averages or old weights that are written
    back after each step, leave a weight as it was. A weight of which a step takes a tenth holds no more than the average of the last ten
    gradients does.
    Symptom: DoRA's magnitudes that stay at their first values; an adapter that changes nothing.
    Fix: see KB313 and KB710; keep an average of weights beside them, and swap it in for evaluations alone.
    Sources: trl#7268, ai-toolkit#1054.
    """
    yield from _taken_back(run_of(facts))
    steps = _full_rate(run_of(facts))
    yield from _erased(steps)
    reached = {n: us for n, us in updates_of(steps).items() if any(u.gradient == "ok" for u in us)}
    if not reached:
        raise NotApplicable("nothing that the optimizer holds has a finite gradient: KB715")
    small_ones: list[str] = []
    for name, updates in reached.items():
        lost = sum(u.lost for u in updates)
        small = updates[0].dtype == "float32" and lost and lost == sum(u.wanted for u in updates)
        if small and not any(u.moved for u in updates):
            small_ones.append(name)
            continue
        why = f"all {lost:,} updates rounded away by {updates[0].dtype}" if lost else "it has a gradient"
        actual = f"the same in {len(steps)} steps: {why}"
        yield Observation.either(name, "moves", actual, ok=any(u.moved for u in updates))
    if small_ones:
        note = f"float32 is too coarse for the updates of {len(small_ones):,} tensors in {len(steps)} steps, as of {small_ones[0]}"
        yield Observation("float32", "moves", "too coarse for some updates", ok=True, note=note)


TAKEN_BACK = 0.9  # of what a step did to a tensor


def _taken_back(run: WatchedRun) -> Iterator[Observation]:
    """Steps that are undone, in most tensors, by something that is no optimizer; one tensor may have bounds."""
    for number, (step, following) in enumerate(pairwise(run.steps), start=1):
        shares = sorted(following.undone.values())
        if shares and not step.skipped and shares[len(shares) // 2] >= TAKEN_BACK:
            actual = f"{shares[len(shares) // 2]:.0%} of it was undone before step {number + 1}, in most of {len(shares):,} tensors"
            yield Observation(f"step {number}", "what it did stays", actual, ok=False)


# Of a weight, in a step: as much as Adam's average loses of earlier gradients (1 - 0.9). Where weights lose it too, none of them
# remembers more of what was learned than the average does.
ERASED = 0.1


def _erased(steps: list[WatchedStep]) -> Iterator[Observation]:
    """Weight decay that erases what is learned: in every step, in a quarter of the tensors or more; a ``lora_B`` is near zero at first."""
    taken = [sorted(min(u.decay, u.shrunk) for u in step.updates.values()) for step in steps if not step.skipped]
    largest = [shares[3 * len(shares) // 4] for shares in taken if shares]
    if largest and min(largest) >= ERASED:
        actual = (
            f"weight decay times the learning rate took {min(largest):.0%} of weights in each of {len(largest)} steps"
        )
        yield Observation("weight decay", "leaves what earlier steps did", actual, ok=False)


SLOW = 1e-3  # of the largest rate: a group that is as good as frozen
DISTANT = 100_000  # steps to the peak, more than any warm-up takes


@rule("KB712", "rate-not-zero", Level.MUST)
def rate_not_zero(facts: Facts) -> Iterable[Observation]:
    """The learning rate is not zero in every step, nor in the last two, nor that of the optimizer multiplied by itself, nor made nothing
    of by the optimizer's epsilon; zero in the first step of a warm-up is no fault. A group whose rate is less than a thousandth of
    another's is a note.

    Why: a schedule that has ended, or was never stepped, trains nothing. What ``LambdaLR`` is passed returns a factor, and not a rate.
    Adam divides by the gradient's size plus epsilon: where epsilon is a thousand times as large as any gradient, so are steps smaller
    than the rate.
    Symptom: a loss that only changes with the batch.
    Fix: look at the scheduler's number of steps, and at where its ``step`` is called; leave ``eps`` at the
    optimizer's default, and clip gradients to no norm that is far below theirs.
    Sources: transformers documentation of schedulers; specification KB712.
    """
    rates = [step.rate for step in run_of(facts).steps]
    warming = len(rates) == 1 and facts.watched.steps[0].peak > 0
    actual, peak = ", ".join(f"{rate:.3g}" for rate in rates), max(step.peak for step in facts.watched.steps)
    ended = len(rates) > 2 and any(rates) and not any(rates[-2:])  # a schedule that begins anew is at zero for one step
    ok = not ended and (any(rates) or warming)
    yield Observation("learning rate", "above zero", actual, ok=ok, note=_slow_groups(facts.watched))
    if (
        len(rates) > 2
        and any(rates)
        and peak < FULL
        and max(rates) <= peak**2 * (1 + SQUARE)
        and not _rises(rates, peak)
    ):
        actual = f"{actual}: at most the optimizer's {peak:.3g} multiplied by itself"
        yield Observation("schedule", "a factor of the optimizer's rate", actual, ok=False)
    yield from _damped(facts.watched)


def _damped(run: WatchedRun) -> Iterator[Observation]:
    """An epsilon beside which every gradient is nothing, in all steps.

    The root of Adam's average of squares is at most as large as the largest gradient, so that no element moved by more than
    a ``SLOW`` part of the rate. A rate that was raised to match is no fault: ``DISTANT`` steps of it lead as far as a weight is large.
    """
    steps = [(s, [u for u in s.updates.values() if u.gradient == "ok"]) for s in run.steps if s.rate and not s.skipped]
    each = [(s, u) for s, updates in steps for u in updates]
    if not each or not all(u.damping * SLOW > 1 and u.stride < SLOW * s.rate for s, u in each):
        return
    stride, size = max(u.stride * s.peak / s.rate for s, u in each), max(u.size for _, u in each)
    if stride * DISTANT < size:
        actual = (
            f"the optimizer's epsilon is at least {min(u.damping for _, u in each):.2g} times any gradient:"
            f" no element moved by more than {max(u.stride for _, u in each):.2g} at a rate of {max(s.rate for s, _ in each):.3g}"
        )
        yield Observation("epsilon", "small beside gradients", actual, ok=False)


SQUARE = 1e-6  # relative: rounding of a product in float64 is far less


def _rises(rates: list[float], peak: float) -> bool:
    """Whether a warm-up comes to its peak in fewer than ``DISTANT`` steps."""
    pace = max(after - before for before, after in pairwise(rates))
    return pace > 0 and peak / pace < DISTANT


def _slow_groups(run: WatchedRun) -> str:
    """What is said of tensors whose learning rate is tiny beside another's; empty where there are none."""
    rates = {name: update.rate for name, update in run.steps[-1].updates.items()}
    fastest = max(rates.values(), default=0.0)
    slow = {name: rate for name, rate in rates.items() if 0 < rate < SLOW * fastest}
    least = min(slow.values(), default=0.0)
    return (
        f"{len(slow):,} tensors have a learning rate of {least:.1g}, others of {fastest:.1g}: {next(iter(slow))}"
        if slow
        else ""
    )


@rule("KB727", "rate-per-step", Level.SHOULD)
def rate_per_step(facts: Facts) -> Iterable[Observation]:
    """The learning rate changes between the steps of an optimizer, and not between the batches that one step accumulates.

    Why: a schedule that is stepped with every batch runs as many times too fast as batches are accumulated, and is at its end, often at
    zero, when a fraction of the steps is taken.
    Symptom: a loss that stands still early; a learning rate in the log that is at zero long before the end.
    Fix: call ``scheduler.step()`` once behind each ``optimizer.step()``; accelerate's prepared schedulers do so by themselves.
    Sources: torch documentation "How to adjust learning rate"; accelerate documentation of gradient accumulation.
    """
    steps = [(n, [b.rates for b in s.batches if b.rates]) for n, s in enumerate(run_of(facts).steps, start=1)]
    several = [(number, rates) for number, rates in steps if len(rates) > 1]
    if not several:
        raise NotApplicable("no step accumulates batches after the optimizer's first one")
    for number, rates in several:
        largest = [max(each) for each in rates]
        same = all(each == rates[0] for each in rates)
        actual = f"{min(largest):.3g} to {max(largest):.3g} in {len(rates)} batches"
        yield Observation(f"step {number}", "one learning rate", actual, ok=same)


@rule("KB724", "state-kept", Level.MUST)
def state_kept(facts: Facts) -> Iterable[Observation]:
    """What an optimizer remembers of earlier steps, such as Adam's averages of gradients, is there in the next step.

    Thrown away once, as where a run has two parts, it is a note.

    Why: an Adam without averages takes steps of one size along the sign of each gradient, whatever the gradient's size.
    Symptom: a loss that falls at first and then swings.
    Fix: build the optimizer once, before the loop; load its state before the first step.
    Sources: torch documentation of ``Optimizer.state_dict``; specification KB724.
    """
    steps = [(n, s) for n, s in enumerate(run_of(facts).steps, start=1) if s.remembered or s.forgotten]
    if not steps:
        raise NotApplicable("the optimizer keeps no state, or took one step")
    always = all(step.forgotten for _, step in steps)
    for number, step in steps:
        lost = f"before step {number} the optimizer's state of {len(step.forgotten):,} tensors was thrown away" * bool(
            step.forgotten
        )
        ok, note = not (lost and always), "" if always else lost
        yield Observation(f"step {number}", "the state of the step before", lost or "there", ok=ok, note=note)
