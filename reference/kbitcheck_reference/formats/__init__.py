"""Formats of packed weights: the modules beside this file, then those of the entry-point group.

A format is a module or an object with ``PACKAGE`` (the library whose classes it knows; "" where its layers keep all that they own, as
those of a backend without a format do), ``packs(parameter) -> bool``,
``holds(module) -> bool``, ``unpack(layer)`` -> float64 ``(out, in)`` and ``pack(weight, scheme)`` -> tensors by name; and, where
weights are unpacked for modules that multiply them themselves, ``read_state(module)`` -> the state whose ``dtype`` they are read in.
``FIXES_DTYPES = True`` says that its layers take inputs or a bias in one dtype alone.
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


def read_states(model: nn.Module) -> Iterator[Any]:
    """States of packed weights that other modules read unpacked, in the state's ``dtype``, which may be assigned."""
    readers = [form.read_state for form in registered() if hasattr(form, "read_state")]
    return (state for module in model.modules() for read in readers if (state := read(module)) is not None)


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
