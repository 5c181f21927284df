"""What rules read: the facts of one case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kbitcheck.core.errors import Raised
from kbitcheck.core.facts.forecast import ForecastFacts
from kbitcheck.core.facts.memory import CostFacts, MemoryFacts
from kbitcheck.core.facts.model import AdaptersFirst, CallFacts, ModelFacts, RefusedCall
from kbitcheck.core.facts.recipe import Recipe
from kbitcheck.core.facts.step import (
    Distance,
    ForwardFacts,
    FunctionFacts,
    GradientFacts,
    HonouredArguments,
    LayerBackward,
    RunFacts,
    StepOutcome,
    StoreFacts,
    TrainingFacts,
)


class Facts(Protocol):
    """The facts of one case, each computed when a rule first reads it, and then kept.

    Stages: ``base`` as loaded, ``prepared``, ``wrapped`` with adapters, ``trained`` after a few optimizer steps. A fact
    that the case does not have raises ``Unavailable``.
    """

    @property
    def case(self) -> str:
        """The case's id."""

    @property
    def profile(self) -> str: ...
    @property
    def freezes(self) -> str: ...
    @property
    def recipe(self) -> Recipe | None:
        """The recipe that was read off the prepared model under profile ``auto``; None where a profile was requested."""
        ...

    @property
    def checkpointing(self) -> str: ...
    @property
    def compute_ulp(self) -> float:
        """The relative rounding error of the dtype that quantized layers compute in."""

    @property
    def half_ulp(self) -> float:
        """The ulp of the half-precision dtype that autocast runs in."""

    @property
    def base(self) -> ModelFacts:
        """The model without adapters, where it is prepared already; else as loaded."""

    @property
    def loaded(self) -> ModelFacts:
        """The model before its preparation."""

    @property
    def call(self) -> CallFacts: ...
    @property
    def prepared(self) -> ModelFacts:
        """The model after preparation."""

    @property
    def wrapped(self) -> ModelFacts:
        """The prepared model with adapters."""

    @property
    def trained(self) -> ModelFacts:
        """The wrapped model after a few optimizer steps."""

    @property
    def bias_after_forward(self) -> Mapping[str, str]:
        """Bits of each quantized layer's bias as a forward leaves it."""

    @property
    def training_flags(self) -> Mapping[str, bool]:
        """By module name, whether it was in train mode before preparation."""

    @property
    def plain_run(self) -> RunFacts:
        """A training step without checkpointing."""

    @property
    def run(self) -> RunFacts:
        """A training step of the wrapped model, checkpointed as the case requests."""

    @property
    def step_raised(self) -> Raised | None:
        """What the training step of ``run`` raised; None if it ran."""

    @property
    def other_mode_raised(self) -> Raised | None:
        """What a training step raised in the other checkpointing mode; None if it ran."""

    @property
    def unprepared(self) -> Facts:
        """A witness: the same case of a base that nothing prepares and that transformers itself checkpoints."""

    @property
    def bare(self) -> Facts:
        """A witness: the same case of a base that is only cast as the profile promises, not prepared or checkpointed."""

    @property
    def gradients(self) -> Mapping[str, GradientFacts]:
        """By adapter, its gradient against the float64 twin's."""

    @property
    def single_gradients(self) -> Mapping[str, GradientFacts]:
        """Adapter gradients for the batch's first row, without an attention mask."""

    @property
    def against_plain(self) -> Mapping[str, Distance]:
        """By adapter, how far checkpointing moves its gradient."""

    @property
    def against_other_mode(self) -> Mapping[str, Distance]:
        """By adapter, how far the other checkpointing mode moves its gradient."""

    @property
    def against_plain_dropout(self) -> Mapping[str, Distance]:
        """By adapter, how far checkpointing moves its gradient under dropout."""

    @property
    def layer_backwards(self) -> Mapping[str, LayerBackward]:
        """By quantized layer, its own backward."""

    @property
    def memory(self) -> MemoryFacts: ...
    @property
    def cost(self) -> CostFacts: ...
    @property
    def forwards(self) -> Sequence[ForwardFacts]:
        """A forward under each condition: train or eval, with or without mask and autocast."""

    @property
    def left_by_evaluation(self) -> int:
        """Bytes that stay alive after a forward in eval mode."""

    @property
    def function(self) -> FunctionFacts: ...
    @property
    def training(self) -> TrainingFacts: ...
    @property
    def store(self) -> StoreFacts: ...
    @property
    def interleaved(self) -> Sequence[StepOutcome]:
        """The steps of programs that interleave training with evaluation, saving and the like."""

    @property
    def generator(self) -> bool:
        """Whether the unprepared model can generate."""

    @property
    def generates(self) -> ForwardFacts: ...
    @property
    def default_call(self) -> CallFacts:
        """The call ``prepare(model)``."""

    @property
    def positional_call(self) -> CallFacts:
        """The call ``prepare(model, False)``."""

    @property
    def repeated(self) -> ModelFacts:
        """A second model, prepared by the same call."""

    @property
    def prepared_again(self) -> ModelFacts:
        """The second model after it is prepared once more."""

    @property
    def switched_off(self) -> ModelFacts:
        """The second model after checkpointing and its hooks are disabled."""

    @property
    def refused(self) -> RefusedCall: ...
    @property
    def adapters_first(self) -> AdaptersFirst: ...
    @property
    def honoured(self) -> HonouredArguments: ...
    @property
    def repeated_run(self) -> RunFacts:
        """A later training step of the same model."""

    @property
    def remote_code(self) -> bool:
        """Whether the model needs code from its repository."""

    @property
    def unfit_targets(self) -> Mapping[str, str]:
        """By adapter target, why it cannot take an adapter."""

    @property
    def forecast(self) -> ForecastFacts: ...
    @property
    def widened(self) -> Mapping[str, int]:
        """Bytes that preparation adds to each half-precision parameter that it widens."""
