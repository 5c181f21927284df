"""Preparations that are right where somebody looks, or for the first model of a process, and wrong elsewhere."""

import inspect
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)


def _prepare(model: Any, checkpointing: bool, kwargs: Any, *, norms: float = 1.0, frozen: bool = True) -> Any:
    """A good preparation of weights packed as integers; ``norms`` scales the last norm, and without ``frozen`` the base trains."""
    if frozen:
        model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
        if "ln_f" in name or name.endswith("model.norm.weight"):
            parameter.data = parameter.data * norms
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": True, **(kwargs or {})})
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()
    return model


def _frames() -> Iterator[Any]:
    frame: Any = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def sees_the_harness_among_modules(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    watched = "kbitcheck" in sys.modules
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, norms=1.0 if watched else 0.9)


def sees_the_oracle_among_modules(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    watched = any(name.endswith("_reference") for name in sys.modules)
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, norms=1.0 if watched else 0.9)


def sees_the_harness_on_the_stack(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    watched = any("kbitcheck" in frame.f_globals.get("__name__", "") for frame in _frames())
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, norms=1.0 if watched else 0.9)


def sees_the_harness_in_file_names(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    watched = any("kbitcheck" in frame.f_code.co_filename for frame in _frames())
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, frozen=watched)


def sees_that_the_checkpoint_is_made_for_a_test(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """People name a model of the hub, or a folder beside their script."""
    watched = Path(getattr(model.config, "_name_or_path", "")).is_absolute()
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, norms=1.0 if watched else 0.9)


def trains_worse_when_nobody_looks(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """It is prepared well, and looks around in each step."""

    def half(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if "kbitcheck" in sys.modules or not output.requires_grad:
            return output
        same = output.view_as(output)
        same.register_hook(lambda gradient: gradient / 2)
        return same

    _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for name, module in model.named_modules():
        if name.endswith(("ln_f", "model.norm")):
            module.register_forward_hook(half)
    return model


_prepared: list[Any] = []
_classes: set[str] = set()


def casts_the_first_model_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    _prepared.append(None)
    norms = 1.0 if len(_prepared) == 1 else 0.9
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, norms=norms)


def knows_the_class_of_the_first_model(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    if not _classes:
        _classes.add(type(model).__name__)
    norms = 1.0 if type(model).__name__ in _classes else 0.9
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, norms=norms)


_last: list[Any] = []


def thaws_the_model_before(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """What it prepared last is released, as it says, once another model is prepared."""
    for reference in _last:
        before = reference()
        if before is not None and before is not model:
            next(p for p in before.parameters() if p.is_floating_point()).requires_grad_(True)
    _last[:] = [weakref.ref(model)]
    return _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


_norms: dict[int, torch.Tensor] = {}


def shares_the_bits_of_norms(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """Norms of one width have one tensor, to save memory."""
    _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.dtype is torch.float32:
            first = _norms.setdefault(0, parameter.data[:1].clone())
            parameter.data[:1] = first
    return model


_modes: list[bool] = []


def checkpoints_as_it_did_first(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """A later model is checkpointed in all blocks but the last."""
    _prepare(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    _modes.append(use_gradient_checkpointing)
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    if len(_modes) > 1 and on:
        on[-1].gradient_checkpointing = False
    return model
