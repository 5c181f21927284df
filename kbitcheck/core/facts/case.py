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
    """What rules read: one case's facts, each computed when first read and then kept."""

    @property
    def case(self) -> str: ...
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
    def compute_ulp(self) -> float: ...
    @property
    def half_ulp(self) -> float:
        """That of what autocast runs in."""
        ...

    @property
    def base(self) -> ModelFacts:
        """The model without adapters, where it is prepared already; else as loaded."""
        ...

    @property
    def loaded(self) -> ModelFacts:
        """The model before its preparation."""
        ...

    @property
    def call(self) -> CallFacts: ...
    @property
    def prepared(self) -> ModelFacts: ...
    @property
    def wrapped(self) -> ModelFacts: ...
    @property
    def trained(self) -> ModelFacts: ...
    @property
    def rounded_biases(self) -> Mapping[str, str]:
        """Bits of each quantized layer's bias, rounded once to the dtype the layer computes in."""
        ...

    @property
    def training_flags(self) -> Mapping[str, bool]: ...
    @property
    def plain_run(self) -> RunFacts: ...
    @property
    def run(self) -> RunFacts: ...
    @property
    def step_raised(self) -> Raised | None:
        """What the training step of ``run`` raised; None where it ran."""
        ...

    @property
    def other_mode_raised(self) -> Raised | None:
        """What a training step raised after the checkpointing mode was switched; None where it ran."""
        ...

    @property
    def unprepared(self) -> Facts:
        """The same case of a base that transformers alone checkpoints and nothing prepares: a witness."""
        ...

    @property
    def bare(self) -> Facts:
        """The same case of a base that is cast as the profile promises, and not prepared or checkpointed: a witness."""
        ...

    @property
    def gradients(self) -> Mapping[str, GradientFacts]: ...
    @property
    def single_gradients(self) -> Mapping[str, GradientFacts]:
        """Those of a step on one row without a mask."""
        ...

    @property
    def against_plain(self) -> Mapping[str, Distance]: ...
    @property
    def against_other_mode(self) -> Mapping[str, Distance]: ...
    @property
    def against_plain_dropout(self) -> Mapping[str, Distance]: ...
    @property
    def layer_backwards(self) -> Mapping[str, LayerBackward]: ...
    @property
    def memory(self) -> MemoryFacts: ...
    @property
    def cost(self) -> CostFacts: ...
    @property
    def forwards(self) -> Sequence[ForwardFacts]: ...
    @property
    def left_by_evaluation(self) -> int:
        """Bytes that stay alive after a forward in eval mode."""
        ...

    @property
    def function(self) -> FunctionFacts: ...
    @property
    def training(self) -> TrainingFacts: ...
    @property
    def store(self) -> StoreFacts: ...
    @property
    def interleaved(self) -> Sequence[StepOutcome]: ...
    @property
    def generator(self) -> bool:
        """Whether the unprepared model can generate."""
        ...

    @property
    def generates(self) -> ForwardFacts: ...
    @property
    def default_call(self) -> CallFacts: ...
    @property
    def positional_call(self) -> CallFacts: ...
    @property
    def repeated(self) -> ModelFacts: ...
    @property
    def prepared_again(self) -> ModelFacts: ...
    @property
    def switched_off(self) -> ModelFacts: ...
    @property
    def refused(self) -> RefusedCall: ...
    @property
    def adapters_first(self) -> AdaptersFirst: ...
    @property
    def honoured(self) -> HonouredArguments: ...
    @property
    def repeated_run(self) -> RunFacts: ...
    @property
    def remote_code(self) -> bool: ...
    @property
    def unfit_targets(self) -> Mapping[str, str]: ...
    @property
    def forecast(self) -> ForecastFacts: ...
    @property
    def widened(self) -> Mapping[str, int]:
        """Bytes that preparation adds to each half-precision parameter that it widens."""
        ...
