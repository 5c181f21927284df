"""Training steps of one prepared model with adapters, none of which changes it, and what they are compared with."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from kbitcheck.core.errors import Unavailable, raised_by
from kbitcheck.core.facts import (
    BlockwiseFacts,
    Cost,
    Distance,
    DrawnFacts,
    Fact,
    ForwardFacts,
    Gap,
    LaterFacts,
    LayerBackward,
    MemoryFacts,
    Passes,
    RunFacts,
    fact,
)
from kbitcheck.models.inputs.text import first_rows
from kbitcheck.observe.blockwise.oracle import Comparison
from kbitcheck.observe.blockwise.record import BlockCall, recorded
from kbitcheck.observe.drawn_adapters import described, drawn_adapters
from kbitcheck.observe.drawn_batch import drawn_batch, drawn_facts, unless_base_raises
from kbitcheck.observe.drawn_form import called, in_drawn_form
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.probes import forwards, layers, memory, process_state, routers, step, switches
from kbitcheck.observe.probes.adapters import Attached, holding, moved
from kbitcheck.observe.probes.soak import EVALUATIONS, LOOKS, kept, soak
from kbitcheck.observe.stages import Wrapped
from kbitcheck.observe.twin.twins import Twins

STEP = Passes(forwards=1, backwards=1)
TWO_STEPS = STEP + STEP
TWINS = STEP + Passes(float64_forwards=1, float64_backwards=1)
BESIDE_TWINS = STEP + TWINS
LAYERS = STEP + Passes(float64_products=1)
SOAKED = 10  # optimizer steps
SOAK = Passes(forwards=SOAKED + EVALUATIONS + LOOKS + 1, backwards=SOAKED + LOOKS + 1, copies=1, calls=1)
# A large model that was dropped for another copy is made again.
AGAIN = Passes(copies=1, calls=1)

Recorded = tuple[step.Step, list[BlockCall]]


class Stepped:
    """Facts of steps of a wrapped model, whose forward runs; ``on_cut`` gives those of a cut, where there is one."""

    def __init__(self, wrapped: Wrapped, outputs: Outputs, on_cut: "Callable[[], Stepped] | None" = None) -> None:
        outputs.require_forward()
        self._on_cut = on_cut or (lambda: self)
        self._wrapped = wrapped
        self._outputs = outputs
        self._preparation = wrapped.preparation
        self._loaded = wrapped.preparation.loaded
        self._spec = wrapped.preparation.spec
        self.computed = wrapped.preparation.computed

    # Of the whole model, which stays as it is from the first to the last; a fact of a cut in between would drop a large one.
    IN_A_ROW = ("run", "plain_run", "memory", "layer_backwards", "blockwise", "evaluation", "repeated_run")

    # One step, plain or checkpointed

    @fact(Cost("whole", needs=("_recorded", "_checkpointed")))
    def _plain(self) -> step.Step:
        """The recorded step, where it has the bits of the checkpointed one; else a step of its own.

        Where a tensor has several readers, recording changes the order in which gradients are added.
        """
        with suppress(Unavailable):
            (recorded, _), _ = self._recorded
            if step.same(recorded, self._checkpointed):
                return recorded
        attached = self._wrapped.attached
        with switches.checkpointing_off(attached.model):
            return self._preparation.step(attached, watch=True)

    @fact(Cost("whole", STEP, large=Cost("whole", STEP + AGAIN)))
    def _checkpointed(self) -> step.Step:
        attached = self._wrapped.attached
        with routers.recorded(attached.model) as scores:
            facts, gradients = self._preparation.step(attached, watch=True)
        return step.Step(replace(facts, routers=routers.stability(attached.model, scores)), gradients)

    _usual = Fact[step.Step](  # of the cut, where facts of a cut are compared with it
        lambda self: self._checkpointed,
        cost=Cost(needs=("_checkpointed",), large=Cost("cut", STEP, ("_checkpointed",))),
    )
    plain_run = Fact[RunFacts](lambda self: self._plain.facts, cost=Cost(needs=("_plain",)))
    run = Fact[RunFacts](lambda self: self._checkpointed.facts, cost=Cost(needs=("_checkpointed",)))
    step_raised = Fact(lambda self: raised_by(lambda: self.run), cost=Cost(needs=("run",)))
    other_mode_raised = Fact(
        lambda self: raised_by(lambda: self.against_other_mode), cost=Cost("cut", needs=("against_other_mode",))
    )

    @property
    def reentrant(self) -> bool:
        """Whether any block ran under reentrant checkpointing."""
        return any(c["use_reentrant"] == "True" for c in self.run.checkpoints)

    @fact(Cost("whole", Passes(forwards=1), needs=("memory", "layer_backwards", "against_plain_dropout")))
    def repeated_run(self) -> RunFacts:
        """The forward of ``run`` once more, whose loss is compared, after everything else that ran on this model."""
        last = self.against_plain_dropout if self._outputs.paths is self._outputs else self.evaluation
        attached = self._attached_after(self.memory, self.layer_backwards, last)
        return self._preparation.step(attached, forward_only=True).facts

    @fact(Cost("whole", needs=("plain_run", "run")))
    def state_changes(self) -> Mapping[str, tuple[str, str]]:
        """By buffer that a training step changes, its digest after a plain and after a checkpointed one, from one start."""
        if not {**self.plain_run.buffers, **self.run.buffers}:
            return {}
        attached = self._wrapped.attached
        start = {name: buffer.clone() for name, buffer in attached.model.named_buffers()}
        checkpointed = self._preparation.step(attached, watch=True).facts.buffers
        for name, buffer in attached.model.named_buffers():
            if name in start:
                buffer.copy_(start[name])
        with switches.checkpointing_off(attached.model):
            plain = self._preparation.step(attached, watch=True).facts.buffers
        return {n: (plain.get(n, "unchanged"), checkpointed.get(n, "unchanged")) for n in {**plain, **checkpointed}}

    def _attached_after(self, *facts: object) -> Attached:
        """The wrapped model; its caller has it only after these facts were computed on it."""
        return self._wrapped.attached

    @fact(Cost("whole", Passes(forwards=1), needs=("run", "plain_run", "memory", "layer_backwards", "blockwise")))
    def evaluation(self) -> ForwardFacts:
        for earlier in ("run", "plain_run", "memory", "layer_backwards", "blockwise"):  # it may change the model
            with suppress(Unavailable):
                getattr(self, earlier)
        return forwards.evaluate(self._wrapped.attached.model, self._preparation.batch, self._preparation.autocast)

    # Gradients, beside those of other runs

    @fact(Cost("whole", LAYERS, large=Cost("whole", LAYERS + AGAIN)))
    def _recorded(self) -> tuple[Recorded, Mapping[str, LayerBackward] | None]:
        """A plain step of the batch, recorded, and the backward of each quantized layer in it; None where inputs have no gradient."""
        attached = self._wrapped.attached
        with layers.Probes(attached.model, self._loaded.weights, leave=True) as probes:
            record = self._record(self._loaded.batch, attached, watch=True)
        return record, probes.results(seed=self._spec.seed) if probes.complete else None

    @fact(
        Cost("block", TWINS, needs=("_recorded",), large=Cost("block", TWINS + Passes(copies=2), needs=("_recorded",)))
    )
    def _whole_batch(self) -> Comparison:
        return self._beside_twins(self._recorded[0], self._loaded.batch)

    @fact(Cost("cut", BESIDE_TWINS))
    def _single_row(self) -> Comparison:
        return self._block_by_block(self._loaded.single)

    def _block_by_block(self, batch: step.Batch) -> Comparison:
        return self._beside_twins(self._record(batch, self._wrapped.attached), batch)

    def _record(self, batch: step.Batch, attached: Attached, *, watch: bool = False) -> Recorded:
        with switches.plain(attached.model), recorded(attached.model) as calls:
            return self._preparation.step(attached, batch=batch, watch=watch), calls

    def _beside_twins(self, record: Recorded, batch: step.Batch) -> Comparison:
        return self._loaded.block_by_block(self._spec, *record, batch)

    @fact(
        Cost(
            "cut",
            BESIDE_TWINS + TWO_STEPS + Passes(forwards=1, copies=4, calls=1),
            models=1,
            large=Cost("cut", BESIDE_TWINS + STEP + AGAIN, needs=("_usual",)),
        )
    )
    def drawn(self) -> DrawnFacts:  # with adapters and in a form of its own, but of a large model
        conditions, batch = drawn_batch(self._loaded, self._spec)
        spec, how = drawn_adapters(self._loaded, self._spec), self._preparation
        attached = self._wrapped.attached if spec is self._spec else how.attach(how.prepared_copy(), spec)
        # First, as the adapters start: they are elsewhere after it.
        usual = self._usual if spec is self._spec else how.step(attached)
        numbers = moved(attached.adapters, spec.seed)
        batch = in_drawn_form(self._loaded, self._spec, batch)
        with unless_base_raises(self._loaded, batch), holding(attached.adapters, numbers):
            record = self._record(batch, attached)
            with switches.dropout(attached.model, 0.0):  # as in the recorded step
                checkpointed = None if spec.checkpointing == "off" else how.step(attached, batch=batch)
        facts = self._loaded.block_by_block(spec, *record, batch, numbers).facts
        return drawn_facts(f"{conditions}{called(batch)}{described(spec)}", facts, record[0], checkpointed, usual)

    @fact(Cost("cut", SOAK, models=1))
    def later(self) -> LaterFacts:
        preparation, spec, batch = self._preparation, self._spec, self._loaded.single
        model, _ = attached = preparation.attach(preparation.prepared_copy())
        how: dict[str, Any] = {"autocast": preparation.autocast, "base_evaluates": self._base_evaluates}
        with process_state.effects(model) as effects, kept(model, batch) as bytes_kept:
            first, *looks = soak(attached, batch, steps=SOAKED, entropy=spec.entropy, seed=spec.seed, **how)
        return LaterFacts(
            looks={place: self._distances(look, first[1]) for place, look in looks},
            checkpoints={place: len(look.facts.checkpoints) for place, look in (first, *looks)},
            kept=bytes_kept[0],
            effects=effects,
        )

    def _base_evaluates(self) -> bool:
        """Whether the unprepared base does, with the same adapters: some models' own code sets a layer's weight where it evaluates."""
        base, _ = self._preparation.attach(self._loaded.copy())
        return not forwards.evaluate(base, self._loaded.single, self._preparation.autocast).raised

    blockwise = Fact[BlockwiseFacts](lambda self: self._whole_batch.facts, cost=Cost(needs=("_whole_batch",)))
    single_blockwise = Fact[BlockwiseFacts](
        lambda self: self._single_row.facts, cost=Cost("cut", needs=("_single_row",))
    )

    @fact(Cost(needs=("twins",), large=Cost(needs=("_whole_batch",))))
    def _twins(self) -> Twins:
        """Gradients of twins of the whole model; of a large one, of its blocks, and of the whole batch alone."""
        if self._loaded.large:
            return Twins(whole=self._whole_batch.twins, single=self._whole_batch.twins)
        return self._outputs.twins

    @fact(Cost(needs=("_twins", "_checkpointed")))
    def gradients(self) -> Mapping[str, Gap]:
        return self._twins.whole.beside(self._checkpointed.gradients)

    @fact(Cost("whole", STEP, needs=("_twins",), large=Cost(needs=("single_blockwise",))))
    def single_gradients(self) -> Mapping[str, Gap]:
        if self._loaded.large:  # one step less: KB305 judges whether checkpointing changes gradients
            return self._on_cut().single_blockwise.adapters
        gradients = self._preparation.step(self._wrapped.attached, batch=self._loaded.single).gradients
        return self._twins.single.beside(gradients)

    @fact(Cost(needs=("_plain", "_checkpointed")))
    def against_plain(self) -> Mapping[str, Distance]:
        return self._distances(self._checkpointed, self._plain)

    @fact(Cost("cut", STEP, needs=("run", "_usual")))
    def against_other_mode(self) -> Mapping[str, Distance]:
        attached = self._wrapped.attached
        with switches.checkpointing_switched(attached.model, use_reentrant=not self.reentrant):
            other = self._preparation.step(attached)
        return self._distances(self._usual, other)

    @fact(Cost("cut", TWO_STEPS))
    def against_plain_dropout(self) -> Mapping[str, Distance]:
        """As ``against_plain``, with every dropout raised and one seed."""
        attached = self._wrapped.attached
        with switches.dropout(attached.model):
            checkpointed = self._preparation.step(attached)
            with switches.checkpointing_off(attached.model):
                plain = self._preparation.step(attached)
        return self._distances(checkpointed, plain)

    def _distances(self, one: step.Step, other: step.Step) -> Mapping[str, Distance]:
        """By adapter, how far its gradients in two steps are from each other."""
        distances = step.distances(one.gradients, other.gradients, {})
        if all(distance.equal for distance in distances.values()):  # twins, which give yardsticks, are dear
            return distances
        return step.distances(one.gradients, other.gradients, self._yardsticks)

    @property
    def _yardsticks(self) -> Mapping[str, float]:
        twins = self._twins
        # The single row's yardstick, where the whole batch gives none.
        yardsticks = {**twins.single.yardsticks, **twins.whole.yardsticks}
        least = twins.whole.median_yardstick or twins.single.median_yardstick
        return {n: max(yardsticks.get(n, 0.0), least) for n in twins.whole.exact}

    # Layers and memory

    @fact(Cost("whole", needs=("_recorded",)))
    def layer_backwards(self) -> Mapping[str, LayerBackward]:
        """The backward of each quantized layer, as the case runs."""
        if (judged := self._recorded[1]) is not None:
            return judged
        return layers.backwards(
            self._wrapped.attached.model,
            self._loaded.batch,
            self._loaded.weights,
            self._preparation.autocast,
            seed=self._spec.seed,
        )

    @fact(
        Cost(
            "cut",
            LAYERS,
            needs=("_training_forwards",),
            large=Cost("cut", LAYERS + AGAIN, needs=("_training_forwards",)),
        )
    )
    def mixed_backwards(self) -> Mapping[str, LayerBackward]:
        """The backward of each quantized layer under autocast, on a single row."""
        if any(f.raised and f.autocast for f in self._outputs.paths.training_forwards):
            return {}  # KB210 reports it
        attached = self._wrapped.attached
        if any(p.quantized_bias for p in self._wrapped.wrapped.parameters.values()):
            # An int8 layer casts its bias in place to the dtype of its input.
            del attached
            attached = self._preparation.attach(self._preparation.prepared_copy())
        try:
            mixed = self._mixed_backwards(attached)
        except RuntimeError:
            if self._base_runs_under_autocast:
                raise
            return {}
        return {f"{name} (autocast, batch 1)": layer for name, layer in mixed.items()}

    def _mixed_backwards(self, attached: Attached) -> Mapping[str, LayerBackward]:
        """The backwards of a step on a single row under autocast, as trainers with mixed precision run it."""
        loaded = self._loaded
        half = partial(torch.autocast, step.device(loaded.batch).type, dtype=loaded.half)
        single = first_rows(loaded.batch, 1)
        encodes = getattr(getattr(loaded.pristine, "config", None), "is_encoder_decoder", False)
        if not encodes and not loaded.reads_labels:
            single.pop(
                "labels", None
            )  # as for a caller with a loss of its own; a decoder's inputs are made from labels
        return layers.backwards(attached.model, single, loaded.weights, half, loaded.half)

    @cached_property
    def _base_runs_under_autocast(self) -> bool:
        """Whether a step under autocast runs in half precision and in float32: some models' own code assumes a dtype."""
        models: tuple[Callable[[], nn.Module], ...] = (self._loaded.copy, self._loaded.wide)
        try:
            for model in models:
                self._mixed_backwards(Attached(model(), {}))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return True

    @fact(Cost("whole", STEP + Passes(forwards=1), needs=("run",)))
    def memory(self) -> MemoryFacts:
        attached = self._attached_after(self.run)  # the first step of a model allocates what it keeps for good
        return memory.activations(
            attached.model,
            self._loaded.batch,
            seed=self._spec.seed,
            autocast=self._loaded.autocast(self._spec.profile, caching=False),
        )
