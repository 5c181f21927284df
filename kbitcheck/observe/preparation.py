"""An implementation applied to a loaded model: how it is called, and fresh copies of the model that it prepares."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from kbitcheck import backends
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Raised, Unavailable
from kbitcheck.core.facts import CallFacts, Computed
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import switches
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.call import SECOND, THIRD, arguments, call, model_from
from kbitcheck.observe.probes.step import Autocast, Batch, Step, train_step


class Preparation:
    """Calls an implementation as the case asks. Each copy that it gives is of the base as loaded, which never runs.

    ``make_room`` is called before each copy: whoever holds a prepared model of a large base drops it then.
    ``computed`` has the facts of the case's stages.
    """

    def __init__(self, spec: CaseSpec, function: Callable[..., Any], loaded: Loaded) -> None:
        self.spec = spec
        self.function = function
        self.loaded = loaded
        self.batch = loaded.batch
        self.make_room: Callable[[], None] = lambda: None
        self.computed = Computed()
        self._released = False

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the case's call."""
        mode = self.spec.checkpointing
        if mode == "off":
            return {SECOND: False}
        if mode == "default":
            return {SECOND: True}
        return {SECOND: True, THIRD: {"use_reentrant": mode == "reentrant"}}

    @property
    def autocast(self) -> Autocast:
        """Makes the context in which training runs under the profile."""
        return self.loaded.autocast(self.spec.profile)

    def copy(self) -> Any:
        """A fresh base."""
        self.make_room()
        model = self.loaded.copy()
        if self._released:
            backends.release(model)
        return model

    @contextmanager
    def released(self) -> Iterator[None]:
        """Meanwhile, bases are as a user loads them, with all that ``backends.steady`` switches off."""
        self._released = True
        try:
            yield
        finally:
            self._released = False

    def apply(self, model: Any, keywords: Mapping[str, Any] | None = None) -> Any:
        """The model, prepared by an unobserved call, as the case asks or with other keyword arguments."""
        return model_from(self.function(model, **arguments(self.function, keywords or self.keywords)), model)

    def prepared_copy(self) -> Any:
        """A fresh base, prepared by an unobserved call; raises ``Unavailable`` if the preparation raises."""
        model = self.copy()
        with warnings.catch_warnings(action="ignore"):
            try:
                return self.apply(model)
            except Exception as error:
                raised = Raised.of(error)
        raise Unavailable(f"preparation raised {raised}", failed=True, raised=raised)

    def observed_copy(self, **keywords: Any) -> tuple[Any, CallFacts]:
        """A fresh base, prepared with the keyword arguments of the case or with others, and the facts of the call."""
        model, facts = call(self.function, self.copy(), **(keywords or self.keywords))
        if facts.raised:
            how = f" with {keywords[THIRD]}" if THIRD in keywords else ""
            raise Unavailable(f"preparation{how} raised {facts.raised}", failed=True, raised=facts.raised)
        return model, facts

    def attach(self, model: nn.Module, spec: CaseSpec | None = None) -> Attached:
        """The case's adapters on a model, or those of another spec, with the same numbers each time."""
        return self.loaded.attach(model, spec or self.spec)

    def step(
        self, attached: Attached, *, batch: Batch | None = None, watch: bool = False, forward_only: bool = False
    ) -> Step:
        """A training step as the case takes it: its batch, its seed, and autocast under the profiles that need it."""
        return train_step(
            attached.model,
            batch or self.batch,
            attached.adapters,
            seed=self.spec.seed,
            autocast=self.autocast,
            watch=watch,
            forward_only=forward_only,
        )


def checkpointed_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """No preparation: the base frozen, so that adapters alone train, and checkpointed as transformers does it."""
    model.requires_grad_(False)
    if use_gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        switches.quietly(lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs))
        model.enable_input_require_grads()
    return model
