"""A case: one model, quantized one way, prepared by one implementation; where each of its facts comes from.

The stages follow one another: ``Loaded`` (never run), ``Called`` (by the implementation), ``Prepared``, ``Wrapped`` (with
adapters), ``Stepped``. Whatever may change a model gets a fresh copy, prepared anew: ``Outputs``, ``Calls``, ``Trained``,
``Interleaved``. To add a fact, add a property to its stage, and a line here and in ``kbitcheck.core.facts.Facts``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import torch

from kbitcheck import backends
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Raised, Unavailable, UsageError
from kbitcheck.core.facts import (
    HALF,
    AdaptersFirst,
    CallFacts,
    CostFacts,
    Distance,
    Facts,
    ForecastFacts,
    ForwardFacts,
    FunctionFacts,
    GradientFacts,
    HonouredArguments,
    LayerBackward,
    MemoryFacts,
    ModelFacts,
    RefusedCall,
    RunFacts,
    StepOutcome,
    StoreFacts,
    TrainingFacts,
)
from kbitcheck.core.facts.recipe import Recipe
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.observe import figures
from kbitcheck.observe.calls import Calls
from kbitcheck.observe.fact import Fact, OpenCase
from kbitcheck.observe.loaded import Loaded, loaded_model
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import digest, layers, step, switches
from kbitcheck.observe.recipe import recipe_of_preparation, settled
from kbitcheck.observe.stages import Called, Prepared, Wrapped
from kbitcheck.observe.static import static_case
from kbitcheck.observe.stepped import Stepped
from kbitcheck.observe.trained import Interleaved, Trained
from kbitcheck.observe.twin import twins


class Prepares(Protocol):
    """What a case needs of an implementation: a name, a callable, and what its import replaced in the libraries."""

    @property
    def name(self) -> str: ...
    @property
    def function(self) -> Callable[..., Any]: ...
    @property
    def patches(self) -> Sequence[str]: ...


def open_case(spec: CaseSpec, implementation: Prepares, *, seconds: float = math.inf) -> OpenCase:
    """The case of a spec; nothing is prepared or run before a fact is read.

    Where the spec says so, or the model is too large for this machine or for ``seconds``, it reads no weights.

    Raises:
        UsageError: the model cannot be loaded as requested.
    """
    assumed = dataclasses.replace(spec, profile="peft") if spec.profile == "auto" else spec  # nothing is prepared
    return static_case(assumed, seconds) or _opened(spec, implementation, loaded_model(spec))


def open_live(model: Any, *, implementation: Prepares, **options: Any) -> Case:
    """The case of a quantized model that the caller has; it is copied, and the copies are prepared and run.

    Raises:
        UsageError: no layer of it is quantized, or an option is unknown.
    """
    source = LiveModel(model)
    device = str(next(model.parameters()).device)
    try:
        spec = CaseSpec(
            model=source.name, quant=source.quant, implementation=implementation.name, **{"device": device, **options}
        )
    except TypeError as error:
        raise UsageError(f"unknown option: {error}") from None
    return _opened(spec, implementation, Loaded.from_source(source, spec))


def _opened(spec: CaseSpec, implementation: Prepares, loaded: Loaded) -> Case:
    recipe = recipe_of_preparation(spec, implementation.function, loaded)
    spec = settled(spec, recipe)
    return Case(spec, implementation.function, loaded, patches=implementation.patches, recipe=recipe)


class Case:
    """The facts of one case, as ``kbitcheck.core.facts.Facts`` describes them."""

    def __init__(
        self,
        spec: CaseSpec,
        function: Callable[..., Any],
        loaded: Loaded,
        *,
        patches: Sequence[str] = (),
        recipe: Recipe | None = None,
    ) -> None:
        self.spec = spec
        self.recipe = recipe
        self.case = spec.id
        self.profile: str = spec.profile
        self.freezes: str = spec.freezes
        self.checkpointing: str = spec.checkpointing
        self.computed: dict[str, Any] = {}
        self._loaded = loaded
        self._preparation = Preparation(spec, function, loaded, patches=patches)
        self._preparation.make_room = self._make_room

    def close(self) -> None:
        """Drop every model of the case."""
        self.computed.clear()

    def _make_room(self) -> None:
        """Drop the one prepared model of a large base, as another copy is needed; its facts stay."""
        if self._loaded.large:
            for name in ("_wrapped", "_called"):
                if name in self.computed:
                    self.computed[name].drop()

    # Stages

    @Fact
    def _called(self) -> Called:
        return Called(self._preparation)

    @Fact
    def _prepared(self) -> Prepared:
        return Prepared(self._called)

    @Fact
    def _wrapped(self) -> Wrapped:
        return Wrapped(self._prepared)

    @Fact
    def _stepped(self) -> Stepped:
        return Stepped(self._wrapped, self._outputs)

    @Fact
    def _outputs(self) -> Outputs:
        return Outputs(self._preparation)

    @Fact
    def _calls(self) -> Calls:
        return Calls(self._preparation, self._outputs)

    @Fact
    def _trained(self) -> Trained:
        return Trained(self._preparation, self._outputs)

    @Fact
    def _interleaved(self) -> Interleaved:
        return Interleaved(self._preparation, self._outputs)

    # Facts, by stage

    @property
    def batch(self) -> step.Batch:
        """The inputs of every forward and step."""
        return self._loaded.batch

    base = Fact[ModelFacts](lambda case: case._loaded.facts)
    loaded = Fact[ModelFacts](lambda case: case._loaded.facts)
    compute_ulp = Fact[float](lambda case: float(torch.finfo(case._loaded.compute).eps))
    half_ulp = Fact[float](lambda case: float(torch.finfo(case._loaded.half).eps))
    remote_code = Fact[bool](lambda case: case._loaded.remote_code)
    generator = Fact[bool](lambda case: case._loaded.generator)
    unfit_targets = Fact[Mapping[str, str]](lambda case: case._loaded.unfit_targets)

    call = Fact[CallFacts](lambda case: case._called.facts)
    training_flags = Fact[Mapping[str, bool]](lambda case: case._called.training_flags)
    prepared = Fact[ModelFacts](lambda case: case._prepared.facts)
    wrapped = Fact[ModelFacts](lambda case: case._wrapped.facts)

    plain_run = Fact[RunFacts](lambda case: case._stepped.plain_run)
    run = Fact[RunFacts](lambda case: case._stepped.run)
    step_raised = Fact[Raised | None](lambda case: case._stepped.step_raised)
    other_mode_raised = Fact[Raised | None](lambda case: case._stepped.other_mode_raised)
    repeated_run = Fact[RunFacts](lambda case: case._stepped.repeated_run)
    gradients = Fact[Mapping[str, GradientFacts]](lambda case: case._stepped.gradients)
    single_gradients = Fact[Mapping[str, GradientFacts]](lambda case: case._stepped.single_gradients)
    against_plain = Fact[Mapping[str, Distance]](lambda case: case._stepped.against_plain)
    against_other_mode = Fact[Mapping[str, Distance]](lambda case: case._stepped.against_other_mode)
    against_plain_dropout = Fact[Mapping[str, Distance]](lambda case: case._stepped.against_plain_dropout)
    layer_backwards = Fact[Mapping[str, LayerBackward]](lambda case: case._stepped.layer_backwards)
    memory = Fact[MemoryFacts](lambda case: case._stepped.memory)

    forwards = Fact[Sequence[ForwardFacts]](lambda case: case._outputs.forwards)
    function = Fact[FunctionFacts](lambda case: case._outputs.function)
    left_by_evaluation = Fact[int](lambda case: case._outputs.left_by_evaluation)
    store = Fact[StoreFacts](lambda case: case._outputs.store)

    default_call = Fact[CallFacts](lambda case: case._calls.default_call)
    positional_call = Fact[CallFacts](lambda case: case._calls.positional_call)
    cost = Fact[CostFacts](lambda case: case._calls.cost)
    repeated = Fact[ModelFacts](lambda case: case._calls.repeated)
    prepared_again = Fact[ModelFacts](lambda case: case._calls.prepared_again)
    switched_off = Fact[ModelFacts](lambda case: case._calls.switched_off)
    refused = Fact[RefusedCall](lambda case: case._calls.refused)
    adapters_first = Fact[AdaptersFirst](lambda case: case._calls.adapters_first)
    honoured = Fact[HonouredArguments](lambda case: case._calls.honoured)

    training = Fact[TrainingFacts](lambda case: case._trained.training)
    trained = Fact[ModelFacts](lambda case: case._trained.facts)
    generates = Fact[ForwardFacts](lambda case: case._trained.generates)
    interleaved = Fact[Sequence[StepOutcome]](lambda case: case._interleaved.outcomes)
    interleaving = Fact(lambda case: case._interleaved.subject)

    # Facts across stages

    @Fact
    def forecast(self) -> ForecastFacts:
        """Predicted from the configuration; the steps only where a user asks about this model."""
        return self._loaded.forecast(self.spec)

    @Fact
    def bias_after_forward(self) -> Mapping[str, str]:
        """Bitsandbytes casts a bias to the compute dtype, or to its input's for int8: fp32 unless the profile is half."""
        rounded = {}
        for name, parameter in self.wrapped.parameters.items():
            if parameter.quantized_bias:
                layer = layers.base_name(name.removesuffix(".bias"), self._loaded.weights)
                module = self._loaded.pristine.get_submodule(layer)
                rounded[name] = digest.bits(backends.bias_after_forward(module))
        return rounded

    @Fact
    def widened(self) -> Mapping[str, int]:
        """Bytes that preparation adds to each half-precision parameter that it widens."""
        after = self.prepared.parameters
        return {
            name: after[name].nbytes - t.nbytes
            for name, t in self.base.parameters.items()
            if not t.packed and t.dtype in HALF and name in after and after[name].dtype not in HALF
        }

    # Witnesses

    @Fact
    def unprepared(self) -> Facts:
        """The same case of a base that transformers alone checkpoints and nothing prepares."""
        self._require_libraries()
        mode = self.checkpointing
        with suppress(Unavailable):  # it may not run at all
            if mode == "default" and not self.step_raised:  # torch's default and transformers' differ
                mode = "reentrant" if self._stepped.reentrant else "non-reentrant"
        return self._witness(checkpointed_alone, mode)

    @Fact
    def bare(self) -> Facts:
        """The same case of a base that is cast as the profile promises, and not prepared or checkpointed."""
        self._require_libraries()

        def cast_alone(model: Any, use_gradient_checkpointing: bool = False) -> Any:
            twins.cast(model.requires_grad_(False), self.profile)
            return model

        return self._witness(cast_alone, "off")

    def _require_libraries(self) -> None:
        """Return if the implementation left the libraries alone; in changed ones a witness proves nothing.

        Raises:
            Unavailable: its import or its call changed them.
        """
        if self._called.patches_libraries:
            raise Unavailable("the implementation patches the libraries, so that no base in this process is a witness")

    def _witness(self, function: Callable[..., Any], checkpointing: str) -> Facts:
        """The same case with another preparation."""
        return Case(dataclasses.replace(self.spec, checkpointing=cast(Any, checkpointing)), function, self._loaded)

    def summary(self) -> dict[str, Any]:
        """Figures of a report; beside those of the loaded model only what has been computed."""
        return figures.summary(self, self.computed, batch=self._loaded.batch)


def checkpointed_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """No preparation: the base frozen, so that adapters alone train, and checkpointed as transformers does it."""
    model.requires_grad_(False)
    if use_gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        switches.quietly(lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs))
        model.enable_input_require_grads()
    return model
