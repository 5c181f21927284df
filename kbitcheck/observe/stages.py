"""The first stages of a case, each made from the one before: called, prepared, wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import CallFacts, ModelFacts
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
    """One observed call of the implementation on a fresh base.

    ``training_flags`` is the ``training`` of each module when the model was handed over: a mixture.
    """

    call: CallFacts
    training_flags: Mapping[str, bool]

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation
        self._model, self.call, self.training_flags = self._run()

    def _run(self) -> tuple[Any, CallFacts, Mapping[str, bool]]:
        model = self.preparation.loaded.copy()
        flags = mix_training_flags(model)
        result, facts = call(self.preparation.function, model, libraries=True, **self.preparation.keywords)
        return self.preparation.returned(result, model), facts, flags

    @property
    def model(self) -> Any:
        """The prepared model; after ``drop`` that of another call.

        Raises:
            Unavailable: the preparation raised.
        """
        if raised := self.call.raised:
            raise Unavailable(f"preparation raised {raised}", failed=True, raised=raised)
        if self._model is None:
            self._model = self._run()[0]
        return self._model

    def drop(self) -> None:
        """Free the model."""
        self._model = None

    @property
    def patches_libraries(self) -> bool:
        """Whether the import or the call of the implementation replaced something in the libraries."""
        return bool(self.preparation.patches) or any("." in name for name in self.call.process)


class Prepared:
    """The model that the call returned, before anything is attached to it or runs on it.

    Raises:
        Unavailable: the preparation raised.
    """

    prepared: ModelFacts

    def __init__(self, called: Called) -> None:
        self.called = called
        self.prepared = snapshot(called.model)


class Wrapped:
    """The prepared model with adapters. What runs on it has to leave it as it was."""

    wrapped: ModelFacts

    def __init__(self, prepared: Prepared) -> None:
        self.preparation = prepared.called.preparation
        self._called = prepared.called
        self._attached: Attached | None = self.preparation.attach(prepared.called.model)
        self.wrapped = snapshot(*self._attached)

    @property
    def attached(self) -> Attached:
        """Model and adapters; after ``drop`` made again from another call."""
        if self._attached is None:
            self._attached = self.preparation.attach(self._called.model)
        return self._attached

    def drop(self) -> None:
        """Free model and adapters."""
        self._attached = None
