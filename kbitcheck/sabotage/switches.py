"""Models whose own switch for checkpointing does more than switch it, or less."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from kbitcheck_reference import prepare_model_for_kbit_training
from transformers import PreTrainedModel

from kbitcheck.sabotage.checkpointing import blocks
from kbitcheck.sabotage.fault import spoils


def subclass(model: Any, **methods: Any) -> None:
    """Give a model a class of the same name with other methods."""
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def _enabling(before: Any) -> dict[str, Any]:
    """The names under which transformers switches checkpointing on (4.x has one), with something done first."""

    def named(name: str) -> Any:
        def enable(self: Any, *args: Any, **kwargs: Any) -> Any:
            before(self, next(iter((*args, *kwargs.values())), None))
            return getattr(super(type(self), self), name)(*args, **kwargs)

        return enable

    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    return {name: named(name) for name in names if hasattr(PreTrainedModel, name)}


@spoils("KB507")
def a_model_that_draws_when_switched_on(model: Any) -> None:
    subclass(model, **_enabling(lambda self, kwargs: torch.rand(1)))


@spoils("KB509")
def a_model_that_warns_when_switched_on(model: Any) -> None:
    subclass(model, **_enabling(lambda self, kwargs: warnings.warn("switching on", FutureWarning, stacklevel=2)))


@spoils("KB404")
def a_model_that_drops_the_arguments(model: Any) -> None:
    subclass(model, **_enabling(lambda self, kwargs: kwargs.pop("preserve_rng_state", None) if kwargs else None))


@spoils("KB601")
def a_model_that_allocates_when_switched_on(model: Any) -> None:
    subclass(model, **_enabling(lambda self, kwargs: torch.zeros(1 << 20)))


@spoils("KB106")
def a_model_that_freezes_when_switched_on(model: Any) -> None:
    """Everything, and with it the adapters that it carries."""
    subclass(model, **_enabling(lambda self, kwargs: self.requires_grad_(False)))


def _handing_the_dictionary_on(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """The reference gives a model a copy of the caller's dictionary; many an implementation does not."""
    prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    if use_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs)
    return model


@spoils("KB503", prepare=_handing_the_dictionary_on)
def a_model_that_fills_in_its_arguments(model: Any) -> None:
    subclass(model, **_enabling(lambda self, kwargs: kwargs.setdefault("preserve_rng_state", True) if kwargs else None))


@spoils("KB506")
def a_model_that_refuses_half_way(model: Any) -> None:
    """It says that it can checkpoint; it raises when the first of its blocks is on."""

    def switch(self: Any, enable: bool = True, **how: Any) -> None:
        blocks(self)[0].gradient_checkpointing = enable
        raise ValueError(f"{type(self).__name__} cannot checkpoint; pass use_gradient_checkpointing=False")

    subclass(model, _set_gradient_checkpointing=switch)
    model.supports_gradient_checkpointing = True
