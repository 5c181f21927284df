"""What optimizer steps, and other steps between them, make of fresh prepared copies with adapters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from kbitcheck.core.facts import Changes, Cost, Fact, ForwardFacts, ModelFacts, TrainingFacts
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import digest, forwards, process_state, step
from kbitcheck.observe.probes.adapters import Attached, holding
from kbitcheck.observe.probes.descent import descend, take_two_steps
from kbitcheck.observe.probes.snapshot import snapshot


@dataclass(frozen=True, slots=True)
class Trained:
    """A prepared copy with adapters after two optimizer steps, and which adapters they changed."""

    trained: ModelFacts
    updated: frozenset[str]

    @classmethod
    def read(cls, attached: Attached, before: Mapping[str, str]) -> Self:
        """Of a model whose adapters had the digests ``before`` by name."""
        model, adapters = attached
        updated = frozenset(n for n, p in adapters.items() if digest.bits(p) != before[n])
        return cls(snapshot(model, adapters), updated)

    @classmethod
    def after(cls, attached: Attached, first: step.Gradients, rate: float, preparation: Preparation) -> Self:
        """Of a model whose first step has the gradients of a step that was taken before; what trains is then as it was."""
        before = _bits(attached)
        trained = {name: p for name, p in attached.model.named_parameters() if p.requires_grad}
        with holding(trained, trained):
            take_two_steps(
                attached,
                preparation.loaded.single,
                first,
                rate,
                seed=preparation.spec.seed,
                autocast=preparation.autocast,
            )
            return cls.read(attached, before)

    def moved_base(self, before: ModelFacts) -> bool:
        """Whether anything but what trains has other bits than before, which nobody put back."""
        after = {**self.trained.parameters, **self.trained.buffers}
        frozen = [t for t in (*before.parameters.values(), *before.buffers.values()) if not t.requires_grad]
        return self.trained.layers != before.layers or any(
            t.name not in after or after[t.name].bits != t.bits for t in frozen
        )


class Descended:
    """A fresh prepared copy whose loss is measured along the first of two optimizer steps, and which generates after them."""

    def __init__(self, preparation: Preparation, outputs: Outputs) -> None:
        self.computed = preparation.computed
        preparation.make_room()
        attached = wrapped_copy(preparation, outputs)
        before = _bits(attached)
        with process_state.effects(attached.model) as training:
            self.way = descend(
                attached.model, preparation.batch, seed=preparation.spec.seed, autocast=preparation.autocast
            )
        self.end = Trained.read(attached, before)
        with process_state.effects(attached.model) as generation:
            self._generates = forwards.generate(attached.model, preparation.batch)
        self._effects = {"training": training, "generation": generation}

    generates = Fact[ForwardFacts](lambda self: self._generates, cost=Cost("cut"))
    effects = Fact[Mapping[str, Changes]](lambda self: self._effects, cost=Cost("cut"))

    training = Fact[TrainingFacts](
        lambda self: TrainingFacts(
            losses=self.way.losses,
            predicted=self.way.predicted,
            slope=self.way.slope,
            uncertainty=self.way.uncertainty,
        ),
        cost=Cost("cut"),
    )


def _bits(attached: Attached) -> Mapping[str, str]:
    return {name: digest.bits(adapter) for name, adapter in attached.adapters.items()}


def wrapped_copy(preparation: Preparation, outputs: Outputs) -> Attached:
    """A fresh base, prepared, with adapters; raises ``Unavailable`` if no forward of it runs."""
    outputs.require_forward()
    return preparation.attach(preparation.prepared_copy())
