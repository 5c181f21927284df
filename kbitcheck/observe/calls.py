"""Further calls of the implementation: in other forms, a second time, refused, with other arguments, after adapters."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import nn

from kbitcheck.core.errors import Raised, Unavailable, cause
from kbitcheck.core.facts import (
    AdaptersFirst,
    CallFacts,
    CallForm,
    Cost,
    CostFacts,
    Fact,
    HonouredArguments,
    ModelFacts,
    Passes,
    RefusedCall,
    fact,
)
from kbitcheck.observe import internals
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import adapters, memory, switches
from kbitcheck.observe.probes.call import SECOND, THIRD, call, model_from
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.observe.stages import mix_training_flags

T = TypeVar("T")


def no_contexts() -> tuple[Any, Any]:
    """Contexts of a checkpoint's forward and recompute that do nothing."""
    return nullcontext(), nullcontext()


# None of them is torch's default; one is no plain value.
ARGUMENTS = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": no_contexts}
FORMS: Mapping[str, Callable[[Callable[..., Any], Any, dict[str, Any]], Any]] = {
    "prepare(model, True, {...})": lambda prepare, model, passed: prepare(model, True, passed),
    "prepare(model, gradient_checkpointing_kwargs={...})": lambda prepare, model, passed: prepare(
        model, **{THIRD: passed}
    ),
    "prepare(model=..., use_gradient_checkpointing=True, gradient_checkpointing_kwargs={...})": (
        lambda prepare, model, passed: prepare(model=model, **{SECOND: True, THIRD: passed})
    ),
}


class Calls:
    """Facts of calls, each on a fresh base."""

    def __init__(self, preparation: Preparation, outputs: Outputs) -> None:
        self._on_cut = outputs.paths is not outputs
        self._preparation = preparation
        self._outputs = outputs
        self.computed = preparation.computed

    @fact(Cost("cut", Passes(copies=1, calls=1), shared=True, models=1))
    def default_call(self) -> CallFacts:
        return self._once("default call", lambda: call(self._preparation.function, self._preparation.copy())[1])

    @fact(Cost("cut", Passes(copies=1, calls=1), shared=True, models=1))
    def positional_call(self) -> CallFacts:
        return self._once(
            "positional call", lambda: call(self._preparation.function, self._preparation.copy().train(), False)[1]
        )

    @fact(Cost("cut", Passes(copies=3, calls=3), shared=True, models=1))
    def call_forms(self) -> Mapping[str, CallForm]:
        return self._once("call forms", lambda: {text: self._called_as(text) for text in FORMS})

    def _called_as(self, text: str) -> CallForm:
        model, asked = self._preparation.copy(), internals.as_text(ARGUMENTS)
        try:
            with warnings.catch_warnings(action="ignore"):
                prepared = model_from(FORMS[text](self._preparation.function, model, {**ARGUMENTS}), model)
        except Exception as error:
            return CallForm(raised=Raised.of(error), asked=asked)
        kept = internals.checkpoint_keywords(prepared)
        return CallForm(raised=None, asked=asked, kept=None if kept is None else internals.as_text(kept))

    def _once(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` returns of a call that names no mode of checkpointing; cases of other modes have the same."""
        return self._preparation.loaded.once(name, self._preparation.function, compute)

    @fact(Cost("cut", Passes(copies=1, calls=2, snapshots=2), models=1))
    def _repeated(self) -> tuple[CostFacts, ModelFacts, ModelFacts]:
        """A base prepared while its memory is watched, then prepared again: the cost, and the model after each call."""
        cost, model = self._watched()
        once = snapshot(model)
        return cost, once, snapshot(self._prepared(model))

    @fact(Cost(needs=("_repeated",)))
    def cost(self) -> CostFacts:
        return self._watched()[0] if self._on_cut else self._repeated[0]

    repeated = Fact[ModelFacts](lambda self: self._repeated[1], cost=Cost("cut", needs=("_repeated",)))
    prepared_again = Fact[ModelFacts](lambda self: self._repeated[2], cost=Cost("cut", needs=("_repeated",)))

    def _watched(self) -> tuple[CostFacts, Any]:
        """What preparing a base costs, and the model that comes of it."""
        self._preparation.make_room()
        model = self._preparation.loaded.own_copy()
        mix_training_flags(model)

        def prepare(base: nn.Module) -> None:
            nonlocal model
            model = self._prepared(base)

        return memory.cost(prepare, model), model

    def _prepared(self, model: nn.Module) -> Any:
        # Not by ``call``, whose copies of random states would count as the preparation's memory.
        try:
            return self._preparation.apply(model)
        except Exception as error:
            raise Unavailable(f"preparation raised {cause(error)}", failed=True) from error

    @fact(Cost("cut", Passes(copies=1, calls=1, snapshots=1), models=1))
    def switched_off(self) -> ModelFacts:
        """After one preparation, then ``disable_input_require_grads`` and checkpointing off."""
        model = self._preparation.prepared_copy()
        if internals.inputs_hooked(model):  # transformers before 5 raises where they are not
            model.disable_input_require_grads()
        if self._preparation.loaded.facts.can_checkpoint and hasattr(model, "gradient_checkpointing_disable"):
            switches.quietly(model.gradient_checkpointing_disable)
        return snapshot(model)

    @fact(Cost("cut", Passes(copies=1, calls=1, snapshots=2), shared=True, models=1))
    def refused(self) -> RefusedCall:
        return self._once("refused", self._refused)

    def _refused(self) -> RefusedCall:
        model = self._preparation.copy()
        cls = type(model)
        model.__class__ = type(
            cls.__name__, (cls,), {"supports_gradient_checkpointing": False, "__module__": cls.__module__}
        )
        before = snapshot(model)
        _, facts = call(self._preparation.function, model, **{SECOND: True})
        return RefusedCall(call=facts, before=before, after=snapshot(model))

    @fact(Cost("cut", Passes(copies=1, calls=1), models=1))
    def adapters_first(self) -> AdaptersFirst:
        preparation, loaded, spec = self._preparation, self._preparation.loaded, self._preparation.spec
        library = "peft" if spec.adapters == "peft" or find_spec("peft") else "reference"
        # PEFT refuses some targets, which KB905 reports.
        fit = [name for name in loaded.targets if name not in loaded.unfit_targets]
        try:
            model, owned = adapters.attach(
                preparation.copy(), fit or loaded.targets, library=library, rank=spec.rank, seed=spec.seed
            )
        except (NotImplementedError, ValueError) as error:  # no embedding, or layers that PEFT does not support
            raise Unavailable(f"{library} cannot put adapters on this model: {cause(error)}") from error
        before = frozenset(n for n, p in owned.items() if p.requires_grad)
        after, facts = call(preparation.function, model, **preparation.keywords)
        trainable = frozenset(n for n, p in after.named_parameters() if p.requires_grad)
        return AdaptersFirst(call=facts, before=before, after=before & trainable)

    @fact(Cost("cut", Passes(forwards=1, backwards=1, copies=1, calls=1), needs=("_training_forwards",), models=1))
    def honoured(self) -> HonouredArguments:
        self._outputs.require_forward()
        mode = self._preparation.spec.checkpointing
        passed: dict[str, Any] = {"preserve_rng_state": False}
        if mode != "default":
            passed["use_reentrant"] = mode == "reentrant"
        if mode == "non-reentrant":
            passed["determinism_check"] = "none"
        arguments = internals.as_text(passed)
        model, facts = self._preparation.observed_copy(**{SECOND: True, THIRD: passed})
        passed.clear()  # the caller's dictionary is the caller's to change
        attached = self._preparation.attach(model)
        # Without dropout: with the random state not preserved another mask, and other experts, are recomputed.
        with switches.dropout(attached.model, 0.0):
            run = self._preparation.step(attached).facts
        return HonouredArguments(arguments=arguments, run=run, call=facts)
