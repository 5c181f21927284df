"""KB701, KB702, KB704, KB705, KB708 and KB741 to KB745: the prepared model in several processes, in trainers, compiled, copied, resumed."""

import functools
import re
from collections.abc import Iterable, Iterator
from statistics import median

from kbitcheck.core.compositions import meaning_of
from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import YARDSTICKS, CompositionFacts, Distance, Facts, ProcessFacts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import Check, rule
from kbitcheck.judge.attribution import UNPREPARED

# What a pass leaves; where it began with the same, what differs first names the cause.
LEFT = {
    "loss": "the base, or its dropout, is another",
    "gradients": "the base, or its checkpointing, is another",
    "adapters behind it": "the optimizer is another",
}


def beside_unprepared(judge: Check) -> Check:
    """The rule, with a failure attributed to the stack if the unprepared base fails in the same place alike."""

    @functools.wraps(judge)
    def judged(facts: Facts) -> Iterable[Observation]:
        failures: dict[str, str] | None = None
        for observation in judge(facts):
            if observation.ok:
                yield observation
                continue
            failures = _unprepared(judge, facts) if failures is None else failures
            same = failures.get(observation.where) == _kind(observation)
            yield observation.attributed(Party.STACK, UNPREPARED) if same else observation

    return judged


def _unprepared(judge: Check, facts: Facts) -> dict[str, str]:
    """How the unprepared base fails, by place."""
    try:
        return {seen.where: _kind(seen) for seen in judge(facts.unprepared) if not seen.ok}
    except (NotApplicable, Unavailable):
        return {}


def _kind(observation: Observation) -> str:
    """What two failures have in common that are alike: the exception, or that something is wrong."""
    raised = re.match(r"raised (\w+)", observation.actual)
    return raised[0] if raised else "wrong"


def _of(facts: Facts, *kinds: str) -> CompositionFacts:
    """The composition of a case, if it is one of these."""
    if facts.put_into not in kinds:
        raise NotApplicable(f"the composition is {facts.put_into}")
    return facts.composition


def _took_steps(composition: CompositionFacts) -> tuple[ProcessFacts, ...]:
    """The processes of a composition none of which was lost; what they raised another rule says."""
    lost = next((p for p in composition.processes if p.raised or p.ended_by), None)
    if lost is not None:
        raise NotApplicable(f"{lost.name} did not take its steps: {lost.raised or f'ended with {lost.ended_by}'}")
    return composition.processes


def _raised(process: ProcessFacts) -> Iterator[Observation]:
    """What ended a process; one that another one ended is not at fault."""
    if process.ended_by:
        yield Observation(process.name, "takes its steps", f"ended with {process.ended_by}", ok=True)
    elif process.raised is not None:
        raised = process.raised
        said = raised.message.partition(". ")[0]
        meaning = f": {means}" if (means := meaning_of(raised.text)) else ""
        place = f" ({raised.place})" if raised.place else ""
        yield Observation(process.name, "takes its steps", f"raised {raised.type}: {said}{place}{meaning}", ok=False)
    else:
        yield Observation(process.name, "takes its steps", "took them", ok=True)


def _steps(composition: CompositionFacts, expected: str) -> Iterator[Observation]:
    """Each process: that it took its steps, that all adapters train, and that their gradients are as expected."""
    for process in composition.processes:
        yield from _raised(process)
        if process.raised or process.ended_by:
            continue
        yield from (Observation(f"{process.name}: {name}", "trains", "frozen", ok=False) for name in process.frozen)
        least = median([g.yardstick for g in process.gradients.values()] or [0.0])
        for name, gradient in process.gradients.items():
            ok = gradient.equal or gradient.relative <= YARDSTICKS * max(gradient.yardstick, least)
            instead = process.resembles.get(name) or _off(gradient)
            yield Observation(f"{process.name}: {name}", expected, expected if ok else instead, ok=ok)


def _off(gradient: Distance) -> str:
    return f"{gradient.relative:.2g} off, relative, where rounding moves it by {gradient.yardstick:.2g}"


def _same_on_ranks(composition: CompositionFacts) -> Iterator[Observation]:
    """That every rank holds the adapters that rank 0 holds."""
    first, *others = composition.processes
    for rank in others:
        for moment, numbers in first.numbers.items():
            here = rank.numbers.get(moment)
            if here is None:
                continue
            unlike = [name for name, bits in numbers.items() if here.get(name) != bits]
            actual = f"{len(unlike):,} of {len(numbers):,} differ, {unlike[0]} among them" if unlike else "equal"
            yield Observation(f"{rank.name}: adapters {moment}", "equal to those of rank 0", actual, ok=not unlike)


@rule("KB701", "ddp-step", Level.SHOULD, about="composition")
@beside_unprepared
def ddp_step(facts: Facts) -> Iterable[Observation]:
    """Under DistributedDataParallel, on two processes, each rank's gradients are the mean of what single processes give of the ranks'
    batches, and all ranks hold the same adapters before and after each step.

    Why: DDP averages what its wrap holds, as a backward reaches it once. An adapter outside it, or put on after it, trains on one rank's
    data alone; nothing raises, and each rank saves another model.
    Symptom: "Expected to mark a variable ready only once"; ranks whose losses drift apart.
    Fix: attach adapters before the wrap, with one seed; pass ``use_reentrant=False``; give each rank its own batches.
    Sources: trl#480, trl#835, peft#1745, accelerate#389.
    """
    composition = _of(facts, "ddp")
    yield from _steps(composition, "the mean over ranks")
    yield from _same_on_ranks(composition)


@rule("KB741", "sharded-step", Level.SHOULD, about="composition")
@beside_unprepared
def sharded_step(facts: Facts) -> Iterable[Observation]:
    """With FSDP2 (``fully_shard`` on each block and on the rest), on two processes, each rank's gradients are the mean of what single
    processes give of the ranks' batches; every adapter is in a unit, and all ranks hold the same ones.

    Packed weights of integers are left out of the units, as accelerate does: each rank has all of them.

    Why: a parameter outside every unit is neither gathered nor averaged, and trains on one rank's data alone.
    Symptom: "FSDP expects uniform original parameter dtype"; ranks whose adapters differ.
    Fix: attach adapters before ``fully_shard``; keep all that trains in one dtype.
    Sources: accelerate#3987, accelerate#3874, axolotl#2992, peft#1614.
    """
    composition = _of(facts, "fsdp2")
    for process in composition.processes:
        yield from (
            Observation(f"{process.name}: {name}", "in a unit", "outside every unit", ok=False)
            for name in process.outside
        )
    yield from _steps(composition, "the mean over ranks")
    yield from _same_on_ranks(composition)


@rule("KB702", "fsdp-uniform-dtype", Level.INFO, about="composition")
def fsdp_uniform_dtype(facts: Facts) -> Iterable[Observation]:
    """What trains in a unit of FSDP has one floating dtype.

    FSDP2 demands it of what trains; FSDP of the first version, which joins a unit's parameters to one, of frozen ones, too: where those
    differ is a note.

    Why: adapters in bfloat16 beside a trained head in float32, or norms that are upcast beside half-precision ones, cannot be joined.
    Symptom: "Must flatten tensors with uniform dtype"; "FSDP expects uniform original parameter dtype".
    Fix: cast all that trains to one dtype before the wrap; with FSDP of the first version leave norms in the compute dtype.
    Sources: trl#1654, trl#1723, trl#6343, accelerate#3987.
    """
    for process in _of(facts, "fsdp2").processes:
        if not process.units and process.ended_by:
            continue
        for unit, (trains, frozen) in process.units.items():
            beside = sorted({*trains, *frozen})
            note = "" if len(beside) < 2 else f"FSDP of the first version refuses units of {' and '.join(beside)}"
            actual = " and ".join(trains) or "nothing trains"
            yield Observation(f"{process.name}: {unit}", "one dtype trains", actual, ok=len(trains) < 2, note=note)


@rule("KB704", "compiled-step", Level.SHOULD, about="composition")
@beside_unprepared
def compiled_step(facts: Facts) -> Iterable[Observation]:
    """A training step that ``torch.compile`` captured gives the gradients of one that it did not.

    What is captured runs on eager kernels here (backend ``aot_eager``): the generated ones are the compiler's matter.

    Why: a hook or a flag that preparation leaves may be captured as it was in the first call, or break the graph in each block.
    Symptom: "recompile_limit reached"; a loss that differs from that of an eager run.
    Fix: keep state of preparation in modules; compile blocks alone; see ``TORCH_LOGS=recompiles``.
    Sources: bitsandbytes#1904, pytorch#141039, peft#3020.
    """
    yield from _steps(_of(facts, "compile"), "that of an eager step")


@rule("KB705", "picklable", Level.SHOULD, about="composition")
@beside_unprepared
def picklable(facts: Facts) -> Iterable[Observation]:
    """The prepared model with adapters can be pickled and deep-copied, and each copy trains as the model does.

    Why: launchers that spawn pickle a model, and reference models and averages of weights are copies; a hook that is a closure cannot be
    pickled, or keeps working on the model that was copied.
    Symptom: "Can't pickle local object"; a copy whose adapters get no gradient.
    Fix: hooks that are methods or functions of a module; set flags on parameters, and not in closures.
    Sources: trl#835; specification KB705.
    """
    yield from _steps(_of(facts, "copy"), "that of the model itself")


@rule("KB708", "resumes", Level.MUST, about="composition")
@beside_unprepared
def resumes(facts: Facts) -> Iterable[Observation]:
    """A run that is saved and resumed in a fresh process continues as if nobody had stopped it, bit by bit.

    Saved, within an accumulation, are adapters, optimizer, scheduler, gradient scaler, the order of the data and the place in it, the
    accumulation's counter and gradients, and random states; there is dropout. A ``Trainer`` is resumed from the checkpoint that it saves.

    Why: an optimizer without its state takes its next steps as its first; without random states dropout is another, and without the
    place in the data rows are read twice.
    Symptom: a loss that jumps where a run was resumed.
    Fix: save and load all of these, random states of ``random``, numpy and torch; pass ``resume_from_checkpoint``.
    Sources: qlora#278, transformers documentation "Trainer: checkpoints"; specification KB708.
    """
    composition = _of(facts, "resume", "trainer-resume")
    for process in composition.processes:
        yield from _raised(process)
    whole, resumed = _took_steps(composition)
    left = whole.passes[whole.saved_behind :]
    count = f"{len(resumed.passes)} passes"
    yield Observation(resumed.name, f"{len(left)} passes", count, ok=len(left) == len(resumed.passes))
    for number, (there, here) in enumerate(zip(left, resumed.passes, strict=False), start=whole.saved_behind + 1):
        wrong = [name for name, state in there.items() if here.get(name) != state]
        lost = [name for name in wrong if name not in LEFT]
        other = f"other {', '.join(wrong)}: {LEFT[wrong[0]]}" if wrong and not lost else "the same"
        actual = f"not continued: {', '.join(lost)}" if lost else other
        yield Observation(f"pass {number}", "as in a run that nobody stopped", actual, ok=not wrong)
        if wrong:
            return


@rule("KB742", "trainer-step", Level.MUST, about="composition")
@beside_unprepared
def trainer_step(facts: Facts) -> Iterable[Observation]:
    """The gradients that the optimizer of a real ``Trainer``, or of TRL's ``SFTTrainer``, uses are those of a loop written by hand.

    Why: a trainer wraps the forward, casts adapters and sets flags on the model that preparation left.
    Symptom: a loss that falls in a loop of one's own, and not in the trainer.
    Fix: see what the trainer changes: ``kbitcheck watch -- python train.py``.
    Sources: trl#5245, trl#6701, transformers#28536.
    """
    yield from _steps(_of(facts, "trainer", "sft"), "that of a loop by hand")


@rule("KB743", "accumulated-step", Level.MUST, about="composition")
@beside_unprepared
def accumulated_step(facts: Facts) -> Iterable[Observation]:
    """Two batches of one row that a ``Trainer`` accumulates give the gradients of one batch of both rows.

    Why: a loss that is a sum, or divided by the tokens of its own batch, weights tokens by the batch that they are in.
    Symptom: a run with accumulation that learns otherwise than one with a large batch.
    Fix: keep ``num_items_in_batch`` among the keywords of the prepared model's forward; divide a loss once.
    Sources: transformers#34191, transformers#34198, trl#2175.
    """
    yield from _steps(_of(facts, "accumulate"), "that of one large batch")


@rule("KB744", "composed-base-kept", Level.MUST, about="composition")
@beside_unprepared
def composed_base_kept(facts: Facts) -> Iterable[Observation]:
    """After the steps of a composition every tensor of the base has the bits that it had, on every rank.

    Not judged are the biases that bitsandbytes itself recasts, and buffers that a step of one process alone changes.

    Why: a wrap may cast, gather or broadcast what is packed, and packed bytes that are cast are other weights.
    Symptom: "loss=0.0, grad_norm=nan" under FSDP2; a model that got worse though its adapters are right.
    Fix: leave packed weights out of casts (``mp_policy``) and, where they are integers, out of the units.
    Sources: accelerate#3983, SkyRL#1968, axolotl#2992.
    """
    if facts.put_into in ("resume", "trainer-resume"):
        raise NotApplicable("its adapters are compared bit by bit: KB708")
    for process in _took_steps(facts.composition):
        for name in process.changed:
            yield Observation(f"{process.name}: {name}", "the bits that it had", "other bits", ok=False)
        yield Observation(process.name, "the base's bits", "compared", ok=True)


@rule("KB745", "composed-recompute", Level.MUST, about="composition")
@beside_unprepared
def composed_recompute(facts: Facts) -> Iterable[Observation]:
    """In a composition blocks run as often as in one process alone, and checkpoint in the same mode.

    Why: a trainer, a wrap or a hook that switches checkpointing on again replaces its arguments, or loses it.
    Symptom: as much memory as without checkpointing; "Expected to mark a variable ready only once" though ``use_reentrant=False`` was passed.
    Fix: pass the arguments to the trainer, too (``gradient_checkpointing_kwargs``), and switch checkpointing on once.
    Sources: transformers#28536, trl#480, axolotl#1021.
    """
    composition = facts.composition
    seen = [p for p in composition.processes if p.runs]
    if not seen:
        _took_steps(composition)
        raise NotApplicable("the runs of blocks cannot be counted in this composition")
    for process in seen:
        mode, alone = (", ".join(p.reentrant) or "none" for p in (process, composition.alone))
        where = f"{process.name}: use_reentrant"
        yield Observation(where, alone, mode, ok=mode == alone or not process.reentrant)
        if process.raised or process.ended_by:  # in the middle of a step
            continue
        for name, runs in composition.alone.runs.items():
            here = process.runs.get(name, 0.0)
            yield Observation(f"{process.name}: {name}", f"{runs:g} runs a step", f"{here:g}", ok=here == runs)
