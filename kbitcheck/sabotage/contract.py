"""Faults of KB5xx."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.checkpointing import _hoard
from kbitcheck.sabotage.fault import Prepare, around, breaks, wraps


@wraps("KB501")
def older_signature(prepare: Prepare) -> Prepare:
    def prepare_model(model: Any, use_gradient_checkpointing: bool = True) -> Any:
        return prepare(model, use_gradient_checkpointing)

    return prepare_model


@wraps("KB502")
def a_copy_returned(prepare: Prepare) -> Prepare:
    def prepare_model(
        model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
    ) -> Any:
        return prepare(copy.deepcopy(model), use_gradient_checkpointing, gradient_checkpointing_kwargs)

    return prepare_model


@wraps("KB502")
def nothing_returned(prepare: Prepare) -> Prepare:
    def prepare_model(
        model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
    ) -> None:
        prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)

    return prepare_model


@wraps("KB503")
def kwargs_filled_in_place(prepare: Prepare) -> Prepare:
    def prepare_model(
        model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
    ) -> Any:
        if gradient_checkpointing_kwargs is not None:
            gradient_checkpointing_kwargs.setdefault("preserve_rng_state", True)
        return prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)

    return prepare_model


@breaks("KB504")
def hooks_that_pile_up(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: None)


@breaks("KB505")
def a_hook_that_nobody_can_remove(model: Any) -> None:
    def require(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(require)


@wraps("KB506")
def frozen_before_it_is_checked(prepare: Prepare) -> Prepare:
    def freeze(model: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    return around(prepare, freeze, lambda model, token: None)


@wraps("KB507")
def seed_set(prepare: Prepare) -> Prepare:
    return around(prepare, lambda model: random.seed(0), lambda model, token: torch.manual_seed(0))


@wraps("KB507")
def class_patched(prepare: Prepare) -> Prepare:
    def patch(model: Any) -> None:
        cls = type(model.get_input_embeddings())
        cls.forward = lambda self, x, original=cls.forward: original(self, x)

    return around(prepare, patch, lambda model, token: None)


_old: list[torch.Tensor] = []


@wraps("KB508")
def old_weights_kept(prepare: Prepare) -> Prepare:
    def keep(model: Any) -> None:
        _old[:] = [p.data for p in model.parameters()]

    return around(prepare, keep, lambda model, token: None)


@breaks("KB508")
def activations_outlive_the_step(model: Any) -> None:
    _hoard(model, [])


@wraps("KB509")
def a_warning_a_call(prepare: Prepare) -> Prepare:
    def warn(model: Any) -> None:
        warnings.warn("preparing a model", UserWarning, stacklevel=2)

    return around(prepare, warn, lambda model, token: None)


@breaks("KB510")
def a_module_renamed(model: Any) -> None:
    model.transformer.last_norm = model.transformer.ln_f


@breaks("KB511")
def config_rewritten(model: Any) -> None:
    model.config.layer_norm_epsilon = 0.5


_calls = {"n": 0}


@breaks("KB512")
def depends_on_earlier_calls(model: Any) -> None:
    _calls["n"] += 1
    with torch.no_grad():
        model.transformer.ln_f.weight.add_(1e-3 * _calls["n"])
