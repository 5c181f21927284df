"""What a fault is, and the registry of faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps as keeping_signature
from typing import Any, Literal

from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.sabotage.helpers import cast, freeze, switch_on

Prepare = Callable[..., Any]
FaultLevel = Literal["model", "implementation"]

# Why rules whose codes begin so have no fault of a level; every other rule has one of each.
WITHOUT: Mapping[tuple[str, FaultLevel], str] = {
    ("KB602", "model"): "the cache is the process's: what a model's switch leaves there is emptied afterwards",
    ("KB9", "implementation"): "a fact about the model, whoever prepares it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to be wrong. ``prepare`` is the broken implementation, ``spoil`` what is done to the base before.

    ``code`` is the rule that must catch it, on its case; ``alone`` says that no other may; ``accelerator`` that no
    CPU can show it. ``level`` is what is broken: a ``model`` after or before a good preparation, or the
    ``implementation``, which is ``standalone`` if it is none of the reference's.
    """

    code: str
    name: str
    level: FaultLevel = "implementation"
    model: str = "tiny:gpt2"
    quant: str = "nf4"
    checkpointing: str = "reentrant"
    profile: str = "peft"
    prepare: Prepare = prepare_model_for_kbit_training
    spoil: Callable[[Any], None] | None = None
    accelerator: bool = False
    alone: bool = False
    standalone: bool = False


_faults: list[Fault] = []


def faults() -> list[Fault]:
    """Every registered fault, by code."""
    return sorted(_faults, key=lambda f: f.code)


def breaks(code: str, **case: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that breaks a model which the reference prepared."""

    def register(damage: Callable[[Any], None]) -> Callable[[Any], None]:
        def broken(
            model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
        ) -> Any:
            prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
            damage(model)
            return model

        _faults.append(Fault(code=code, name=damage.__name__, level="model", prepare=broken, **case))
        return damage

    return register


def wraps(code: str, **case: Any) -> Callable[[Callable[[Prepare], Prepare]], Callable[[Prepare], Prepare]]:
    """Register a function that makes a broken implementation of a good one."""

    def register(make: Callable[[Prepare], Prepare]) -> Callable[[Prepare], Prepare]:
        _faults.append(Fault(code=code, name=make.__name__, prepare=make(prepare_model_for_kbit_training), **case))
        return make

    return register


def spoils(code: str, **case: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that spoils the base before anything looks at it; the reference prepares, or ``prepare``."""

    def register(spoil: Callable[[Any], None]) -> Callable[[Any], None]:
        _faults.append(Fault(code=code, name=spoil.__name__, level="model", spoil=spoil, **case))
        return spoil

    return register


def implements(code: str, **case: Any) -> Callable[[Prepare], Prepare]:
    """Register a broken implementation that owes the reference nothing."""

    def register(prepare: Prepare) -> Prepare:
        _faults.append(Fault(code=code, name=prepare.__name__, prepare=prepare, standalone=True, **case))
        return prepare

    return register


def adds(code: str, *, last: bool = False, **case: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register an implementation that does this to the model besides: before it switches on, or ``last`` of all."""

    def register(do: Callable[[Any], None]) -> Callable[[Any], None]:
        def prepare(
            model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
        ) -> Any:
            freeze(model)
            cast(model)
            if not last:
                do(model)
            switch_on(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
            if last:
                do(model)
            return model

        prepare.__name__, prepare.__module__ = do.__name__, do.__module__
        implements(code, **case)(prepare)
        return do

    return register


def around(prepare: Prepare, before: Callable[[Any], Any], after: Callable[[Any, Any], Any]) -> Prepare:
    """An implementation with the same signature that does something before and after."""

    @keeping_signature(prepare)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = before(args[0])
        returned = prepare(*args, **kwargs)
        after(args[0], token)
        return returned

    return wrapped
