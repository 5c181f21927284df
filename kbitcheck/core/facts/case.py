"""What rules read: the facts of one case."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Raised
from kbitcheck.core.facts import step
from kbitcheck.core.facts.adapter import MergeFacts, Replacement, SavedAdapter
from kbitcheck.core.facts.blockwise import BlockwiseFacts, Gap
from kbitcheck.core.facts.composition import CompositionFacts
from kbitcheck.core.facts.cost import Cost
from kbitcheck.core.facts.cut import CutFacts
from kbitcheck.core.facts.memory import CostFacts, ForecastFacts, MemoryFacts
from kbitcheck.core.facts.model import (
    AdaptersFirst,
    CallFacts,
    CallForm,
    Changes,
    ModelFacts,
    QuantizerFacts,
    RefusedCall,
    StoredFacts,
)
from kbitcheck.core.facts.recipe import Recipe
from kbitcheck.core.facts.unwatched import UnwatchedFacts
from kbitcheck.core.facts.use import UseFacts
from kbitcheck.core.facts.watched import WatchedRun

T = TypeVar("T", covariant=True)
V = TypeVar("V")
FREE = Cost()
WHOLE = "the whole model"


@dataclass(frozen=True, slots=True)
class Failure:
    """What the computation of a fact raised, and where. Nothing that its frames held is kept."""

    error: Exception
    where: TracebackType | None

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """The failure by an exception that was caught."""
        behind: BaseException | None = error
        while behind is not None:
            traceback.clear_frames(behind.__traceback__)
            behind = behind.__cause__ or behind.__context__
        return cls(error, error.__traceback__)

    def again(self) -> Exception:
        """The exception as it was raised first."""
        return self.error.with_traceback(self.where)


class Computed(dict[str, Any]):
    """The facts of one case that have been computed, by name.

    ``at_hand`` are those that are being computed, the innermost last; ``finished`` has also those that are kept elsewhere.
    ``guard`` is called with the name of a fact before it is computed, and may raise ``Unavailable`` instead. ``watch`` is
    called when the computation of a fact begins or ends. ``failed`` has what the computation of a fact raised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, Failure] = {}
        self.finished: set[str] = set()
        self.at_hand: list[str] = []
        self.guard: Callable[[str], None] = lambda name: None
        self.watch: Callable[[], None] = lambda: None

    def follow(self, other: "Computed") -> None:
        """Count what is computed here among the other's, under the other's guard and watch."""
        self.finished, self.at_hand = other.finished, other.at_hand
        self.guard, self.watch = (lambda name: other.guard(name)), (lambda: other.watch())

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Around the computation of a fact."""
        self.guard(name)
        self.at_hand.append(name)
        self.watch()
        try:
            yield
            self.finished.add(name)
        except Exception as error:
            self.failed[name] = Failure.of(error)
            raise
        finally:
            self.at_hand.pop()
            self.watch()

    def clear(self) -> None:
        super().clear()
        self.failed.clear()


class Fact(Generic[T]):
    """An attribute that is computed when it is first read, and then kept in its owner's ``computed``.

    What raised is not computed again: it raises the same.
    ``"memory" in case.computed`` says whether a fact has been computed; clearing ``computed`` frees all of them. What is
    shared by cases is kept with their base instead.
    """

    def __init__(self, compute: Callable[[Any], T], name: str = "", *, cost: Cost = FREE) -> None:
        self.compute = compute
        self.cost = cost
        self.name = name

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, cls: type | None = None) -> T:
        if owner is None:
            return cast(T, self)
        computed: Computed = owner.computed
        if self.name in computed:
            return cast(T, computed[self.name])
        if self.name in computed.failed:
            raise computed.failed[self.name].again()
        with computed.computing(self.name):
            value = self.compute(owner)
        if not self.cost.shared:
            computed[self.name] = value
        return value


def fact(cost: Cost) -> Callable[[Callable[[Any], V]], Fact[V]]:
    """Makes a method a ``Fact`` of this cost."""
    return lambda compute: Fact(compute, cost=cost)


class Facts:
    """The facts of one case, each computed when a rule first reads it, and then kept.

    Stages: ``base`` as loaded, ``prepared``, ``wrapped`` with adapters, ``trained`` after a few optimizer steps. A fact
    that the case does not have raises ``Unavailable``.
    """

    case: str
    """The case's id."""
    profile: str
    """Name of the profile whose dtypes the case is judged by."""
    freezes: str
    """When the base is frozen: ``at-prepare`` or ``at-attach``."""
    checkpointing: str
    """The requested mode of checkpointing."""
    by_hand: bool
    """Whether blocks that recompute without a flag do so because the caller's own code asks for it."""
    conditions: str
    """Which conditions of many the case looks at; empty: none."""
    put_into: str
    """The composition that the case puts the prepared model into; empty: none."""
    seed: int
    """The seed that all that is drawn hangs on."""
    recipe: Recipe | None
    """The recipe that was read off the prepared model under profile ``auto``; None where a profile was requested."""
    compute_ulp: float
    """The relative rounding error of the dtype that quantized layers compute in."""
    half_ulp: float
    """The ulp of the half-precision dtype that autocast runs in."""
    cut: CutFacts
    """The cut of the model that facts about code paths ran on."""
    base: ModelFacts
    """The model without adapters, where it is prepared already; else as loaded."""
    loaded: ModelFacts
    """The model before its preparation."""
    call: CallFacts
    """The call that prepared the model."""
    prepared: ModelFacts
    """The model after preparation."""
    wrapped: ModelFacts
    """The prepared model with adapters."""
    trained: ModelFacts
    """The wrapped model after a few optimizer steps."""
    updated: frozenset[str]
    """Names of the adapters that these steps changed."""
    bias_after_forward: Mapping[str, Mapping[str, str]]
    """Bits of each quantized layer's bias as a forward leaves it."""
    training_flags: Mapping[str, bool]
    """By module name, whether it was in train mode before preparation."""
    plain_run: step.RunFacts
    """A training step without checkpointing."""
    run: step.RunFacts
    """A training step of the wrapped model, checkpointed as the case requests."""
    state_changes: Mapping[str, tuple[str, str]]
    """By buffer that a training step changes, its digest after a plain step and after a checkpointed one, from one start."""
    step_raised: Raised | None
    """What the training step of ``run`` raised; None if it ran."""
    other_mode_raised: Raised | None
    """What a training step raised in the other checkpointing mode; None if it ran."""
    unprepared: "Facts"
    """A witness: the same case of a base that nothing prepares and that transformers itself checkpoints."""
    bare: "Facts"
    """A witness: the same case of a base that is only cast as the profile promises, not prepared or checkpointed."""
    blockwise: BlockwiseFacts
    """A plain step beside twins that take its inputs and gradients, block by block."""
    single_blockwise: BlockwiseFacts
    """``blockwise`` for the batch's first row, without an attention mask."""
    drawn: step.DrawnFacts
    """A step of a batch that is drawn for this case."""
    later: step.LaterFacts
    """Steps after many steps, beside the first."""
    gradients: Mapping[str, Gap]
    """By adapter, its gradient in the step of ``run``, beside the twins'."""
    single_gradients: Mapping[str, Gap]
    """``gradients`` for the batch's first row, without an attention mask."""
    against_plain: Mapping[str, step.Distance]
    """By adapter, how far checkpointing moves its gradient."""
    against_other_mode: Mapping[str, step.Distance]
    """By adapter, how far the other checkpointing mode moves its gradient."""
    against_plain_dropout: Mapping[str, step.Distance]
    """By adapter, how far checkpointing moves its gradient under dropout."""
    layer_backwards: Mapping[str, step.LayerBackward]
    """By quantized layer, its own backward."""
    mixed_backwards: Mapping[str, step.LayerBackward]
    """By quantized layer, its own backward under autocast, of a single row."""
    memory: MemoryFacts
    """Bytes of activations in a plain and in a checkpointed step."""
    cost: CostFacts
    """Bytes while the model is prepared."""
    evaluation: step.ForwardFacts
    """A forward in eval mode, between two training steps."""
    forwards: Sequence[step.ForwardFacts]
    """A forward under each condition: train or eval, with or without mask and autocast."""
    left_by_evaluation: int
    """Bytes that stay alive after a forward in eval mode."""
    function: step.FunctionFacts
    """Errors of the logits of base, prepared model and same-dtype twin against those of the float64 twin."""
    start: step.StartFacts
    """What adapters that were put on and have not trained do to the logits."""
    training: step.TrainingFacts
    """The loss along an optimizer step."""
    effects: Mapping[str, Changes]
    """What training and generation, by name, change in the process."""
    lasting: Changes
    """What has changed in the process since the case was opened, but for what the import of any library may change."""
    imported: Changes
    """What the import of the implementation changed in the process."""
    store: step.StoreFacts
    """Save and reload of a prepared model that never ran, and of its adapters."""
    interleaved: Sequence[step.StepOutcome]
    """The steps of programs that interleave training with evaluation, saving and the like."""
    uses: Sequence[UseFacts]
    """What came of later uses of the prepared model, beside those of the base."""
    unwatched: UnwatchedFacts
    """The case in processes that cannot tell who runs it, where another model is prepared after it or before."""
    generator: bool
    """Whether the unprepared model can generate."""
    generates: step.ForwardFacts
    """Generation with the wrapped model after a few optimizer steps."""
    default_call: CallFacts
    """The call ``prepare(model)``."""
    positional_call: CallFacts
    """The call ``prepare(model, False)``, on a model all in train mode."""
    call_forms: Mapping[str, CallForm]
    """Calls that pass every argument by position, every one by name, or some by either, by their text."""
    first_prepared: ModelFacts
    """A model after preparation, beside which ``repeated`` is the second."""
    repeated: ModelFacts
    """A second model, prepared by the same call."""
    prepared_again: ModelFacts
    """The second model after it is prepared once more."""
    switched_off: ModelFacts
    """The second model after checkpointing and its hooks are disabled."""
    refused: RefusedCall
    """A call on the same architecture, declared not to support checkpointing."""
    adapters_first: AdaptersFirst
    """A call on a model that already carries adapters."""
    honoured: step.HonouredArguments
    """Checkpointing arguments that are not torch's defaults, and what reached torch when they were passed."""
    repeated_run: step.RunFacts
    """A later training step of the same model, without its backward."""
    remote_code: bool
    """Whether the model needs code from its repository."""
    quantizer: QuantizerFacts
    """What was requested of the model's quantization, and what transformers says of its method."""
    stored: StoredFacts
    """The packed weights of the model's checkpoint, and what became of them."""
    unfit_targets: Mapping[str, str]
    """By adapter target, why it cannot take an adapter."""
    forecast: ForecastFacts
    """Bytes that training is predicted to take."""
    widened: Mapping[str, int]
    """Bytes that preparation adds to each half-precision parameter that it widens."""
    watched: WatchedRun
    """Optimizer steps of a script that is watched."""
    adapter: SavedAdapter
    """An adapter that was saved."""
    composition: CompositionFacts
    """The prepared model in several processes, in a trainer, compiled, copied or resumed."""
    merge: MergeFacts
    """An adapter that was saved, merged into its base."""
    replaced: Mapping[str, Replacement]
    """The tensors that a saved adapter stores in the place of the base's, beside these; by their names in the file."""

    def __init__(self) -> None:
        self.computed = Computed()

    def compute(self, name: str) -> Any:
        """The fact of that name, computed anew; raises ``Unavailable`` if the case does not have it."""
        raise NotImplementedError

    def cut_behind(self, reads: Set[str]) -> str:
        """The cut that any of these facts ran on, ``2 of 30 blocks``; ``WHOLE`` if it could not be made; else empty."""
        return ""


for _name in Facts.__annotations__:
    setattr(Facts, _name, Fact(methodcaller("compute", _name), _name))


class OpenCase(Facts):
    """A case whose facts can be read, and whose models are dropped when it is closed."""

    def __init__(self, spec: CaseSpec, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.case = spec.id
        self.profile, self.freezes, self.checkpointing = spec.profile, spec.freezes, spec.checkpointing
        self.recipe, self.conditions, self.seed = recipe, spec.conditions, spec.seed
        self.put_into = spec.composition
        self.by_hand = False
        self.budget: Any = None  # a ``core.plan.Budget``, where the case is planned

    @property
    def in_a_row(self) -> Sequence[str]:
        """Facts to read one after the other before all others: of one model that is made again once it was dropped."""
        return ()

    def summary(self) -> dict[str, Any]:
        """Figures for a report."""
        raise NotImplementedError

    def close(self) -> None:
        """Drop every model of the case."""
        self.computed.clear()
