"""What optimizer steps, and other steps between them, make of fresh prepared copies with adapters."""

from __future__ import annotations

from collections.abc import Sequence

from kbitcheck.core.facts import Fact, ForwardFacts, ModelFacts, StepOutcome, TrainingFacts
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import forwards, interleaving
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.snapshot import fingerprints, snapshot
from kbitcheck.observe.twin import twins


class Trained:
    """A fresh prepared copy with adapters after a few optimizer steps."""

    training: TrainingFacts
    trained: ModelFacts
    generates: ForwardFacts

    def __init__(self, preparation: Preparation, outputs: Outputs) -> None:
        preparation.make_room()
        expected = preparation.loaded.twins(preparation.spec)
        model, adapters = wrapped_copy(preparation, outputs)
        before = fingerprints(adapters)
        losses = twins.train(
            model,
            preparation.batch,
            learning_rate=expected.learning_rate,
            autocast=preparation.loaded.autocast(preparation.spec.profile),
            seed=preparation.spec.seed,
        )
        after = fingerprints(adapters)
        changed = frozenset(n for n in before if before[n] != after[n])
        self.training = TrainingFacts(losses=losses, twin_losses=expected.losses, changed=changed)
        self.trained = snapshot(model, adapters)
        self.generates = forwards.generate(model, preparation.batch)


class Interleaved:
    """Fresh prepared copies with adapters that take training steps and others in any order."""

    def __init__(self, preparation: Preparation, outputs: Outputs) -> None:
        self._preparation = preparation
        self._outputs = outputs
        self.computed = preparation.computed

    @property
    def subject(self) -> interleaving.Subject:
        """What a session of steps runs on."""
        preparation, loaded = self._preparation, self._preparation.loaded
        return interleaving.Subject(
            make=lambda: wrapped_copy(preparation, self._outputs),
            prepare=preparation.apply,
            attach=preparation.attach,
            batch=preparation.batch,
            layers=tuple(loaded.weights),
            half=loaded.half,
            generator=loaded.generator,
            needs_autocast=loaded.autocast(preparation.spec.profile) is not None,
            seed=preparation.spec.seed,
        )

    @Fact
    def interleaved(self) -> Sequence[StepOutcome]:
        return interleaving.Session(self.subject).run(interleaving.STANDARD_ORDER)


def wrapped_copy(preparation: Preparation, outputs: Outputs) -> Attached:
    """A fresh base, prepared, with adapters.

    Raises:
        Unavailable: the preparation raised, or no forward of the prepared model runs.
    """
    outputs.require_forward()
    return preparation.attach(preparation.prepared_copy())
