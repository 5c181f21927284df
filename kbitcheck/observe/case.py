"""A case: one model, quantized one way, prepared by one implementation; where each of its facts comes from.

The stages follow one another: ``Loaded`` (never run), ``Called`` (prepared by the implementation), ``Wrapped`` (with
adapters), ``Stepped``. Whatever may change a model gets a fresh copy, prepared anew: ``Outputs``, ``Calls``, ``Descended``,
``Trained``.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from kbitcheck import backends
from kbitcheck.core.cases import CaseSpec, WitnessSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import (
    HALF,
    Changes,
    Cost,
    CutFacts,
    Fact,
    Facts,
    ForecastFacts,
    ModelFacts,
    Passes,
    QuantizerFacts,
    StepOutcome,
    StoredFacts,
    StoreFacts,
    UnwatchedFacts,
    UseFacts,
    WatchedRun,
    fact,
)
from kbitcheck.core.facts.case import WHOLE, OpenCase
from kbitcheck.core.facts.recipe import Recipe
from kbitcheck.models.cut import NoCut
from kbitcheck.models.stored import stored
from kbitcheck.observe import figures
from kbitcheck.observe.calls import Calls
from kbitcheck.observe.interleaving import Session
from kbitcheck.observe.loaded import Loaded, loaded_model
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.preparation import Preparation, checkpointed_alone
from kbitcheck.observe.probes import layers
from kbitcheck.observe.probes.process_state import Before
from kbitcheck.observe.probes.quantizer import of_model
from kbitcheck.observe.probes.snapshot import biases_after_forward, state_keys
from kbitcheck.observe.stages import Called, Wrapped
from kbitcheck.observe.stepped import STEP, Stepped
from kbitcheck.observe.store import differences
from kbitcheck.observe.trained import Descended, Trained, wrapped_copy
from kbitcheck.observe.twin import twins
from kbitcheck.observe.unwatched.process import UNWATCHED, unwatched
from kbitcheck.observe.uses.side_by_side import ONE_USE, drawn, side_by_side
from kbitcheck.observe.watch.own_steps import optimizer_like, optimizer_steps

# Before any subject is imported: one that patches a quantizer's library must be seen to.
backends.load()

STAGES = (Called, Wrapped, Stepped, Outputs, Calls, Descended, Trained)


def facts_of(stage: type) -> frozenset[str]:
    """Names of the facts that a stage has: those of its public attributes."""
    return frozenset({*vars(stage), *inspect.get_annotations(stage)} & Facts.__annotations__.keys())


def attribute_of(stage: type) -> str:
    """The attribute of a case that holds a stage."""
    return f"_{stage.__name__.lower()}"


STAGE_OF = {fact: attribute_of(stage) for stage in STAGES for fact in facts_of(stage)}
OTHERS = ("tiny:gpt2", "tiny:llama")  # of which one is of another class than the case's model
NEEDS_A_REAL_RUN = "needs steps of your own training: `kbitcheck watch`"


class _Paths(NamedTuple):
    """The case that facts about code paths are of; with a cut, also the keys that the whole prepared model saves."""

    case: "Case"
    cut: CutFacts
    state_keys: frozenset[str] = frozenset()


class Case(OpenCase):
    """The facts of one case: those of its stages, and here those of the loaded model and across stages."""

    outputs = Outputs

    def __init__(
        self,
        spec: CaseSpec,
        function: Callable[..., Any],
        loaded: Loaded,
        *,
        imported: Changes | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(spec, recipe)
        self._loaded = loaded
        self._function = function
        self.batch = loaded.batch
        self._imported = imported or {}
        self._before = Before(loaded.pristine)
        self._preparation = Preparation(spec, function, loaded)
        self._preparation.make_room = self._make_room
        self.computed = self._preparation.computed

    @property
    def in_a_row(self) -> Sequence[str]:
        if self.budget is None or not (self._loaded.large and self._loaded.copies):
            return ()
        return [name for name in ("training", *Stepped.IN_A_ROW, "trained") if self.budget.planner.wants(name)]

    def begin(self, called: Called, left: ModelFacts) -> None:
        """Begin with a call that was made for the recipe, and the facts of the model that it left."""
        called.belong_to(self._preparation)
        taken: dict[str, Any] = {"_called": called}
        if not called.call.raised:
            taken["prepared"] = left
        self.computed.update(taken)
        self.computed.finished |= taken.keys()

    def compute(self, name: str) -> Any:
        """The fact of that name, from its stage."""
        case = self._paths.case if name in ON_CUT else self
        return getattr(getattr(case, STAGE_OF[name]), name)

    def _make_room(self) -> None:
        """Drop the one prepared model of a large base, and that of its cut, as another copy is needed; their facts stay."""
        if self._loaded.large:
            self.drop_evidence()

    def drop_evidence(self) -> None:
        for name in self.computed.keys() & {"_wrapped", "_called"}:
            self.computed[name].drop()
        paths = self.computed.get("_paths")
        if paths is not None and paths.case is not self:
            paths.case.drop_evidence()

    @fact(Cost(large=Cost("cut", Passes(forwards=2, copies=3, calls=1, snapshots=2), models=1)))
    def _paths(self) -> "_Paths":
        """The case that facts about code paths are of: this one, of a cut of its model; itself where there is no cut."""
        try:
            proof, loaded = self._loaded.cut(self.spec)
            spec = dataclasses.replace(self.spec, cut="never")
            case = type(self)(spec, self._function, loaded, imported=self._imported, recipe=self.recipe)
            case.computed.follow(self.computed)
            case._preparation.make_room = self._make_room
            model = self._called.model
            proof.require_alike(model, case._called.model)
        except (NoCut, Unavailable) as reason:
            return _Paths(self, CutFacts(reason=str(reason)))
        made = proof.cut
        return _Paths(case, CutFacts(towers=made.towers, tokens=str(made.vocabulary or "")), state_keys(model))

    cut = Fact[CutFacts](lambda self: self._paths.cut, cost=Cost(needs=("_paths",)))

    _called = Fact(lambda self: Called(self._preparation), cost=Cost("whole", Passes(copies=1, calls=1), models=1))

    @fact(Cost("static", Passes(snapshots=1), needs=("_called", "_paths", "prepared")))
    def _wrapped(self) -> Wrapped:
        _ = self._paths  # what it compares has no adapters
        return Wrapped(self._called)

    _stepped = Fact(
        lambda self: Stepped(self._wrapped, self._outputs, lambda: self._paths.case._stepped),
        cost=Cost(needs=("_wrapped", "_outputs", "_training_forwards")),
    )

    @fact(Cost(needs=("_paths",)))
    def _outputs(self) -> Outputs:
        case = self._paths.case
        return self.outputs(self._preparation, None if case is self else case._outputs)

    _calls = Fact(lambda self: Calls(self._preparation, self._outputs), cost=Cost(needs=("_outputs",)))
    _descended = Fact(
        lambda self: Descended(self._preparation, self._outputs),
        cost=Cost(
            "cut",
            Passes(forwards=8, backwards=2, copies=1, calls=1, snapshots=1),
            needs=("_paths", "_outputs", "_training_forwards"),
            models=1,
        ),
    )

    @fact(
        Cost(
            needs=("_paths", "_descended"),
            large=Cost("whole", STEP + Passes(snapshots=1), needs=("_paths", "_descended", "_checkpointed")),
        )
    )
    def _trained(self) -> Trained:
        descended = self._paths.case._descended
        if self._paths.case is self:
            return descended.end
        gradients = self._stepped._checkpointed.gradients
        made = Trained.after(self._wrapped.attached, gradients, descended.way.rate, self._preparation)
        if made.moved_base(self.wrapped):
            self.drop_evidence()
        return made

    def session(self) -> Session:
        """A fresh prepared model with adapters, for steps in any order."""
        return Session(self._preparation, lambda: wrapped_copy(self._preparation, self._outputs))

    @fact(
        Cost(
            "cut",
            Passes(forwards=23, backwards=11, copies=8, calls=6),
            needs=("_paths", "_outputs", "_training_forwards", "generator"),
            models=2,
        )
    )
    def interleaved(self) -> Sequence[StepOutcome]:
        _ = self.generator  # first, so that its copy of the base is gone
        return self._paths.case.session().programs()

    @fact(Cost("cut", needs=("_paths", "_outputs", "round_trip")))
    def store(self) -> StoreFacts:
        facts = self._paths.case._outputs.round_trip
        if self._paths.case is self:
            return facts
        return dataclasses.replace(facts, **differences(self._loaded.state_keys, self._paths.state_keys))

    @fact(Cost("cut", ONE_USE, needs=("_paths", "_outputs", "_training_forwards", "generator"), models=2))
    def uses(self) -> Sequence[UseFacts]:
        _ = self.generator
        case, spec = self._paths.case, self.spec
        case._outputs.require_forward()
        return list(side_by_side(case._preparation, drawn(spec)))

    @fact(Cost("whole", UNWATCHED, needs=("_outputs", "_training_forwards"), shared=True, models=2))
    def unwatched(self) -> UnwatchedFacts:
        self._outputs.require_forward()
        model = next(name for name in OTHERS if name != self.spec.model)
        spec = CaseSpec(model=model, quant=self.spec.quant, implementation=self.spec.implementation)
        how = self._preparation
        return self._loaded.once("unwatched", self._function, lambda: unwatched(how, loaded_model(spec)))

    # The process of a caller who lends the model does more than the case.
    lasting = Fact[Changes](lambda self: self._before.lasting() if self._loaded.copies else {})
    imported = Fact[Changes](lambda self: self._imported)
    base = Fact[ModelFacts](lambda self: self._loaded.facts)
    loaded = Fact[ModelFacts](lambda self: self._loaded.facts)
    compute_ulp = Fact[float](lambda self: float(torch.finfo(self._loaded.compute).eps))
    half_ulp = Fact[float](lambda self: float(torch.finfo(self._loaded.half).eps))
    remote_code = Fact[bool](lambda self: self._loaded.remote_code)
    generator = Fact[bool](
        lambda self: self._paths.case._loaded.generator,
        cost=Cost("cut", Passes(forwards=2, copies=1), needs=("_paths",), shared=True, models=1),
    )
    quantizer = Fact[QuantizerFacts](lambda self: of_model(self._loaded.pristine, self.spec.quant, self._loaded.facts))
    stored = Fact[StoredFacts](lambda self: stored(self._loaded.pristine))
    unfit_targets = Fact[Mapping[str, str]](lambda self: self._loaded.unfit_targets)
    forecast = Fact[ForecastFacts](lambda self: self._loaded.forecast(self.spec))

    @Fact
    def watched(self) -> WatchedRun:
        """Two steps of an optimizer like the caller's on a fresh prepared model; none where no caller has an optimizer."""
        training = self._loaded.training
        if training.optimizer is None:
            raise Unavailable(NEEDS_A_REAL_RUN)
        model = wrapped_copy(self._preparation, self._outputs).model
        like = dataclasses.replace(training, optimizer=optimizer_like(training.optimizer, model))
        return optimizer_steps(model, self.batch, like, autocast=self._preparation.autocast)

    @fact(Cost(needs=("wrapped",)))
    def bias_after_forward(self) -> Mapping[str, Mapping[str, str]]:
        rounded = {}
        for name, parameter in self.wrapped.parameters.items():
            if parameter.quantized_bias:
                layer = layers.base_name(name.removesuffix(".bias"), self._loaded.weights.layers)
                module = self._loaded.weights.layers[layer]
                rounded[name] = biases_after_forward(module)
        return rounded

    @fact(Cost(needs=("base", "prepared")))
    def widened(self) -> Mapping[str, int]:
        after = self.prepared.parameters
        return {
            name: after[name].nbytes - t.nbytes
            for name, t in self.base.parameters.items()
            if not t.packed and t.dtype in HALF and name in after and after[name].dtype not in HALF
        }

    @fact(Cost(needs=("call",), witness=True))
    def unprepared(self) -> Facts:
        """The same case of a base that transformers alone checkpoints and nothing prepares."""
        self._require_libraries()
        mode = self.checkpointing
        with suppress(Unavailable):  # it may not run at all
            if mode == "default" and not self.step_raised:  # torch's default and transformers' differ
                mode = "reentrant" if self._stepped.reentrant else "non-reentrant"
        return self._witness(checkpointed_alone, mode)

    @fact(Cost(needs=("call",), witness=True))
    def bare(self) -> Facts:
        """The same case of a base that is cast as the profile promises, and not prepared or checkpointed."""
        self._require_libraries()

        def cast_alone(model: Any, use_gradient_checkpointing: bool = False) -> Any:
            twins.cast(model.requires_grad_(False), self.profile)
            return model

        return self._witness(cast_alone, "off")

    def _require_libraries(self) -> None:
        """Raise ``Unavailable`` where the implementation changed the libraries: a witness proves nothing there."""
        if any("." in name for name in (*self._imported, *self.call.process)):
            raise Unavailable("the implementation patches the libraries, so that no base in this process is a witness")

    def _witness(self, function: Callable[..., Any], checkpointing: str) -> Facts:
        """The same case with another preparation, which the cases of a base that draw alike share."""
        spec = WitnessSpec.of(self.spec, implementation=function.__name__, checkpointing=checkpointing)
        return self._loaded.witness(spec, lambda: Case(spec, function, self._loaded))

    def cut_behind(self, reads: Set[str]) -> str:
        paths = self.computed.get("_paths")
        if paths is None or not reads & ON_CUT:
            return ""
        return str(paths.cut) or (WHOLE if paths.cut.reason else "")

    def close(self) -> None:
        """Drop every model of the case, and those of its cut."""
        paths = self.computed.pop("_paths", None)
        if paths is not None and paths.case is not self:
            paths.case.close()
        super().close()

    def summary(self) -> dict[str, Any]:
        """Figures of a report; beside those of the loaded model only what has been computed."""
        summary = figures.summary(self, self.computed, batch=self.batch)
        if self.budget is not None and self.budget.left_out:
            summary["left_out"] = self.budget.as_json()
        return summary


ON_CUT = frozenset(
    name
    for owner in (*STAGES, Case)
    for name, each in vars(owner).items()
    if isinstance(each, Fact) and each.cost.on == "cut"
)
