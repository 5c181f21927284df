"""The first stages of a case, one made from the other: the model that the call prepared, and that model with adapters."""

from collections.abc import Mapping
from typing import Any

from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import CallFacts, Cost, Fact, ModelFacts, Passes
from kbitcheck.observe.meant_to_train import declared
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.call import call
from kbitcheck.observe.probes.snapshot import snapshot


def mix_training_flags(model: Any) -> dict[str, bool]:
    """Put every third module into eval mode and the others into train mode; the flags by module name."""
    flags = {}
    for index, (name, module) in enumerate(model.named_modules()):
        module.training = flags[name] = index % 3 != 1
    return flags


class Called:
    """One observed call of the implementation on a fresh base, some of whose modules were in train mode, some not."""

    call: CallFacts
    training_flags: Mapping[str, bool]

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation
        self.computed = preparation.computed
        self._model, self.call, self.training_flags = self._run()

    def _run(self) -> tuple[Any, CallFacts, Mapping[str, bool]]:
        model = self.preparation.loaded.copy()
        self.lease = self.preparation.loaded.lease
        flags = mix_training_flags(model)
        return *call(self.preparation.function, model, libraries=True, **self.preparation.keywords), flags

    @property
    def left(self) -> Any:
        """The model as the call left it, also where the call raised."""
        return self._model

    def belong_to(self, preparation: Preparation) -> None:
        """Be a stage of another preparation that calls the same function alike."""
        self.preparation, self.computed = preparation, preparation.computed

    @property
    def model(self) -> Any:
        """The prepared model; after ``drop``, or when its base was taken back, that of another call.

        Raises:
            Unavailable: the preparation raised.
        """
        if raised := self.call.raised:
            raise Unavailable(f"preparation raised {raised}", failed=True, raised=raised)
        if self._model is None or self.lease is not self.preparation.loaded.lease:
            self._model = self._run()[0]
        return self._model

    prepared = Fact[ModelFacts](lambda self: snapshot(self.model), cost=Cost("static", Passes(snapshots=1)))

    first_prepared = Fact[ModelFacts](lambda self: self.prepared, cost=Cost("cut", needs=("prepared",)))

    def drop(self) -> None:
        """Free the model."""
        self._model = None


class Wrapped:
    """The prepared model with adapters. What runs on it has to leave it as it was."""

    wrapped: ModelFacts

    def __init__(self, called: Called) -> None:
        _ = called.prepared  # as it is before adapters
        self.preparation = called.preparation
        self._called = called
        self._attached: Attached | None = None
        self._lease: object = None
        model, adapters = self.attached
        self.wrapped = snapshot(model, adapters, declared=declared(model, called.preparation.loaded.training))

    @property
    def attached(self) -> Attached:
        """Model and adapters; after ``drop``, or when the base was taken back, made again from another call."""
        model = self._called.model
        if self._attached is None or self._lease is not self._called.lease:
            self._attached, self._lease = self.preparation.attach(model), self._called.lease
        return self._attached

    def drop(self) -> None:
        """Free model and adapters."""
        self._attached = None
