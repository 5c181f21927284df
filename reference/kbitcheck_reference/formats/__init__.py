"""Formats of packed weights: the modules beside this file, then those of the entry-point group.

A format is a module or an object with ``PACKAGE`` (the library whose classes it knows), ``packs(parameter) -> bool``,
``holds(module) -> bool``, ``unpack(layer)`` -> float64 ``(out, in)`` and ``pack(weight, scheme)`` -> tensors by name.
"""

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

GROUP = "kbitcheck_reference.formats"

_added: list[Any] = []


@cache
def _installed() -> tuple[Any, ...]:
    built_in = (import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return (*built_in, *(point.load() for point in entry_points(group=GROUP)))


def registered() -> tuple[Any, ...]:
    """Every format, built-in ones first."""
    return (*_installed(), *_added)


@contextmanager
def added(form: Any) -> Iterator[None]:
    """Register one more format for a while, without an entry point."""
    _added.append(form)
    try:
        yield
    finally:
        _added.remove(form)


def of(module: nn.Module) -> Any:
    """The format of the packed weight that a module holds; None where none knows it."""
    return next((form for form in registered() if form.holds(module)), None)


def packs(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a packed weight of any format."""
    return any(form.packs(parameter) for form in registered())


def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a quantized layer stands for: float64, ``(out, in)``, on the layer's device. Nothing of it changes.

    Raises:
        TypeError: no format knows the layer.
    """
    form = of(layer)
    if form is None:
        raise TypeError(f"{type(layer).__name__} is no quantized layer of a format that is registered here")
    weight: torch.Tensor = form.unpack(layer)
    return weight
