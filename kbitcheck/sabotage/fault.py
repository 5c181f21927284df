"""What a fault is, and the registry of faults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.core.compositions import Composition
from kbitcheck.sabotage.helpers import cast, prepare_well, switch_on

Prepare = Callable[..., Any]
Register = Callable[[Callable[..., Any]], Callable[..., Any]]
FaultLevel = Literal["model", "implementation", "run", "saved"]
SAVED = ("KB801", "KB804", "KB805", "KB806", "KB807", "KB808", "KB809", "KB810")

FILES = "a fault of saved files, whoever trained"
SCRIPT = "a fault of a training script, whoever prepared the model"
PREPARATION = "a fault that shows before a script trains"
# Those whose rules say nothing of a script's own adapters, as KB102 and KB302 do, and nothing of its run, as KB313 does.
FAMILIES = (
    *(f"KB10{digit}" for digit in "13456"), *(f"KB30{digit}" for digit in "13456789"), "KB310", "KB311", "KB312", "KB2", "KB4", "KB5", "KB6",
    "KB802", "KB803", "KB9",
)  # fmt: skip
# Why the rules whose codes begin so have no fault of a level; every other rule has one on each level.
WITHOUT: Mapping[tuple[str, FaultLevel], str] = {
    ("KB602", "model"): "the cache is the process's: what a model's switch leaves there is emptied afterwards",
    ("KB213", "model"): "what is shared among models is the implementation's",
    ("KB514", "model"): "a model that knows who watches it does so whoever prepares it",
    ("KB313", "model"): SCRIPT,
    ("KB313", "implementation"): SCRIPT,
    ("KB7", "model"): SCRIPT,
    ("KB7", "implementation"): SCRIPT,
    **{(family, "run"): PREPARATION for family in FAMILIES},
    ("KB802", "implementation"): "a fact about the model, whoever prepares it",
    ("KB9", "implementation"): "a fact about the model, whoever prepares it",
    **{(code, level): FILES for code in SAVED for level in ("model", "implementation", "run")},
    **{(f"KB{family}", "saved"): "nothing of it is saved" for family in (1, 2, 3, 4, 5, 6, 7, 802, 803, 9)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One defect. ``prepare`` is the broken implementation; ``spoil`` damages the loaded model before it is prepared.

    ``train`` is a training script instead, which prepares and trains the model, on each of several ``ranks``; ``save`` damages an adapter
    that was saved, ``merge`` merges a layer of it badly; with ``beside`` it is judged beside its base's weights.
    ``compose`` spoils the processes of a ``composition``.
    ``config`` has the fields of the model's
    configuration that differ. The rule ``code`` must catch the fault on the fault's case; with ``alone`` no other rule may
    fail. ``conditions`` are those that the case looks at (``CaseSpec``): the one
    under which the fault shows. No CPU shows an ``accelerator`` fault. ``level`` says what is broken: the ``model``, before or after a good
    preparation, the ``implementation``, which is ``standalone`` if it does not call the reference, the ``run``, or what it ``saved``.
    """

    code: str
    name: str
    level: FaultLevel = "implementation"
    model: str = "tiny:gpt2"
    beside: bool = False
    adapters: str = "reference"
    quant: str = "nf4"
    config: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: str = "reentrant"
    profile: str = "peft"
    prepare: Prepare = prepare_model_for_kbit_training
    spoil: Callable[[Any], None] | None = None
    train: Callable[[Any], None] | None = None
    save: Callable[[Any], None] | None = None
    merge: Callable[[Any], None] | None = None
    compose: Callable[[Any], None] | None = None
    composition: Composition = ""
    conditions: str = ""
    ranks: int = 1
    accelerator: bool = False
    alone: bool = False
    standalone: bool = False


_faults: list[Fault] = []


def faults() -> list[Fault]:
    """Every registered fault, by code."""
    return sorted(_faults, key=lambda f: f.code)


def breaks(code: str, **case: Any) -> Register:
    """Register ``f(model)``, which damages a model that the reference prepared."""

    def prepare(damage: Callable[[Any], None], model: Any, *arguments: Any) -> Any:
        prepare_model_for_kbit_training(model, *arguments)
        damage(model)
        return model

    return _registering(code, prepare, level="model", **case)


def spoils(code: str, **case: Any) -> Register:
    """Register ``f(model)``, which damages a loaded model before it is prepared, by the reference or by ``prepare``."""

    def register(spoil: Callable[[Any], None]) -> Callable[[Any], None]:
        _faults.append(Fault(code=code, name=spoil.__name__, level="model", spoil=spoil, **case))
        return spoil

    return register


def trains(code: str, **case: Any) -> Register:
    """Register ``f(script)``, a training script (``sabotage.watched.Script``)."""

    def register(train: Callable[[Any], None]) -> Callable[[Any], None]:
        _faults.append(
            Fault(code=code, name=train.__name__, level="run", train=train, **{"model": "tiny:llama", **case})
        )
        return train

    return register


def composes(code: str, composition: Composition, **case: Any) -> Register:
    """Register ``f(run)``, which spoils one process of a composition (``observe.composition.steps.Run``)."""

    def register(compose: Callable[[Any], None]) -> Callable[[Any], None]:
        fields = {
            "model": "tiny:llama",
            "adapters": "peft",
            "checkpointing": "non-reentrant",
            "conditions": "processes",
            **case,
        }
        name, fault = compose.__name__, {"compose": compose, "composition": composition}
        _faults.append(Fault(code=code, name=name, level="run", **fault, **fields))  # type: ignore[arg-type]
        return compose

    return register


def saves(code: str, **case: Any) -> Register:
    """Register ``f(files)``, which damages the files of a saved adapter (``sabotage.adapter.Files``)."""

    def register(damage: Callable[[Any], None]) -> Callable[[Any], None]:
        fields = {"model": "tiny:llama", **case}
        _faults.append(Fault(code=code, name=damage.__name__, level="saved", save=damage, **fields))
        return damage

    return register


def merges(code: str, **case: Any) -> Register:
    """Register ``f(layer)``, which merges one adapted layer of PEFT's into its base."""

    def register(merge: Callable[[Any], None]) -> Callable[[Any], None]:
        fields = {"model": "tiny:llama", **case}
        _faults.append(Fault(code=code, name=merge.__name__, level="saved", merge=merge, beside=True, **fields))
        return merge

    return register


def wraps(code: str, **case: Any) -> Register:
    """Register ``f(prepare, model, checkpointing, kwargs)``, a broken implementation that calls ``prepare``."""

    def prepare(wrapper: Prepare, *arguments: Any) -> Any:
        return wrapper(prepare_model_for_kbit_training, *arguments)

    return _registering(code, prepare, **case)


def implements(code: str, **case: Any) -> Register:
    """Register ``f(model, checkpointing, kwargs)``, the steps of a broken implementation without the reference."""

    def prepare(steps: Prepare, model: Any, *arguments: Any) -> Any:
        steps(model, *arguments)
        return model

    return _registering(code, prepare, standalone=True, **case)


def casts(code: str, **case: Any) -> Register:
    """Register ``f(model)``, the cast of an implementation whose other steps are good."""

    def prepare(broken_cast: Callable[[Any], None], model: Any, *arguments: Any) -> Any:
        prepare_well(model, *arguments, cast=broken_cast)
        return model

    return _registering(code, prepare, standalone=True, **case)


def adds(code: str, *, last: bool = False, **case: Any) -> Register:
    """Register ``f(model)``, which a good implementation runs too: before it enables checkpointing, or ``last``."""

    def prepare(addition: Callable[[Any], None], model: Any, *arguments: Any) -> Any:
        model.requires_grad_(False)
        cast(model)
        if not last:
            addition(model)
        switch_on(model, *arguments)
        if last:
            addition(model)
        return model

    return _registering(code, prepare, standalone=True, **case)


def _registering(code: str, prepare: Prepare, *, own_signature: bool = False, **fields: Any) -> Register:
    """Registers ``prepare`` with the decorated function as its first argument, behind the reference's signature."""

    def register(fault: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_model(
            model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
        ) -> Any:
            return prepare(fault, model, use_gradient_checkpointing, gradient_checkpointing_kwargs)

        prepare_model.__name__, prepare_model.__module__ = fault.__name__, fault.__module__
        implementation = fault if own_signature else prepare_model
        _faults.append(Fault(code=code, name=fault.__name__, prepare=implementation, **fields))
        return fault

    return register
