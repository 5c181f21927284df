"""Profile ``auto``: the recipe that a model's dtypes follow is read off the model before its case is opened."""

import dataclasses

import torch
from torch import nn

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import HALF, ModelFacts
from kbitcheck.core.facts.recipe import Recipe
from kbitcheck.core.methods import Treatment
from kbitcheck.core.profile import AS_LOADED
from kbitcheck.core.recipe import read
from kbitcheck.observe import internals


def settled(spec: CaseSpec, recipe: Recipe | None) -> CaseSpec:
    """The spec under the profile of the recipe, and with its time of freezing; unchanged without a recipe."""
    if recipe is None:
        return spec
    freezes = "at-attach" if spec.freezes == "at-attach" else recipe.freezes
    return dataclasses.replace(spec, profile=recipe.profile, freezes=freezes)


def takes_one_dtype(base: ModelFacts) -> bool:
    """Whether quantized layers of the base take one half dtype alone, so that a preparation need cast nothing."""
    return any(layer.fixed in HALF for layer in base.layers.values())


def promises_upcast(base: ModelFacts) -> bool:
    """Whether preparations promise float32 around the base's quantized layers; elsewhere each has a recipe of its own."""
    return all(layer.promises_upcast for layer in base.layers.values())


def as_loaded(spec: CaseSpec, base: ModelFacts, treatment: Treatment | None = None) -> CaseSpec:
    """The spec under the profile that casts nothing, where nothing need be cast, or the preparation casts nothing that none promises.

    ``treatment`` is what the preparation does with models of this quantization method, where that is known; it decides then.
    """
    unless = takes_one_dtype(base) if treatment is None else not treatment.casts and not promises_upcast(base)
    return dataclasses.replace(spec, profile=AS_LOADED) if unless else spec


def recipe_of_call(model: nn.Module, facts: ModelFacts, loaded: ModelFacts) -> Recipe:
    """The recipe of a model that a call prepared, or left as it is by raising; ``loaded`` are facts of its base."""
    return read(facts, loaded, autocast=runs_under_autocast(model))


def recipe_of_prepared(model: nn.Module, facts: ModelFacts) -> Recipe:
    """The recipe of a model that is prepared already; its base is frozen by now, or nobody has prepared it."""
    return dataclasses.replace(read(facts, autocast=runs_under_autocast(model)), freezes="at-prepare")


def runs_under_autocast(model: nn.Module) -> bool:
    """Whether autocast is on, or accelerate has wrapped the model's forward, as it does for mixed precision alone."""
    return torch.is_autocast_enabled() or any(internals.forward_is_wrapped(m) for m in model.modules())
