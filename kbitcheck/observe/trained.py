"""What optimizer steps, and other steps between them, make of fresh prepared copies with adapters."""

from collections.abc import Mapping

from kbitcheck.core.facts import Changes, ForwardFacts, ModelFacts, TrainingFacts
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import digest, forwards, process_state
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.descent import descend
from kbitcheck.observe.probes.snapshot import snapshot


class Trained:
    """A fresh prepared copy with adapters after two optimizer steps."""

    training: TrainingFacts
    trained: ModelFacts
    generates: ForwardFacts
    effects: Mapping[str, Changes]

    def __init__(self, preparation: Preparation, outputs: Outputs) -> None:
        preparation.make_room()
        model, adapters = wrapped_copy(preparation, outputs)
        before = {n: digest.bits(p) for n, p in adapters.items()}
        with process_state.effects(model) as training:
            way = descend(model, preparation.batch, seed=preparation.spec.seed, autocast=preparation.autocast)
        changed = frozenset(n for n, p in adapters.items() if digest.bits(p) != before[n])
        self.training = TrainingFacts(
            losses=way.losses,
            predicted=way.predicted,
            slope=way.slope,
            uncertainty=way.uncertainty,
            changed=changed,
        )
        self.trained = snapshot(model, adapters)
        with process_state.effects(model) as generation:
            self.generates = forwards.generate(model, preparation.batch)
        self.effects = {"training": training, "generation": generation}


def wrapped_copy(preparation: Preparation, outputs: Outputs) -> Attached:
    """A fresh base, prepared, with adapters; raises ``Unavailable`` if no forward of it runs."""
    outputs.require_forward()
    return preparation.attach(preparation.prepared_copy())
