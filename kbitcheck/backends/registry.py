"""The backends that kbitcheck knows: the folders beside this file, then those of the entry-point group. No torch here."""

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from kbitcheck.backends.protocol import Backend
from kbitcheck.backends.schemes import Scheme
from kbitcheck.core.errors import UsageError

GROUP = "kbitcheck.backends"

_added: list[Backend] = []


@cache
def _installed() -> tuple[Backend, ...]:
    folders = pkgutil.iter_modules([str(Path(__file__).parent)])
    built_in = [import_module(f"kbitcheck.backends.{f.name}").BACKEND for f in folders if f.ispkg]
    return _distinct((*built_in, *(point.load() for point in entry_points(group=GROUP))))


def registered() -> tuple[Backend, ...]:
    """Every backend, built-in ones first; a ``UsageError`` where two have a name or a scheme in common."""
    return (*_installed(), *_added)


def _distinct(backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
    for names in ([b.name for b in backends], [s.name for b in backends for s in b.schemes]):
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UsageError(f"two backends are called {', '.join(sorted(twice))}: uninstall one")
    return backends


@contextmanager
def added(backend: Backend, form: Any = None) -> Iterator[None]:
    """Register one more backend for a while, and its format for the oracle, without entry points."""
    _distinct((*registered(), backend))
    with ExitStack() as registrations:
        if form is not None:
            formats = import_module("kbitcheck_reference.formats")  # which imports torch
            registrations.enter_context(formats.added(form))
        _added.append(backend)
        registrations.callback(_added.remove, backend)
        yield


def available() -> tuple[Backend, ...]:
    """The backends whose library is installed here."""
    return tuple(backend for backend in registered() if _runs_here(backend))


def libraries() -> set[str]:
    """The modules whose import comes before any layer of the backends whose library is installed here."""
    return {name for backend in available() for name in backend.libraries}


@cache
def _runs_here(backend: Backend) -> bool:
    """Asked for every module of a model; what is installed stays so while a process runs."""
    return not backend.unavailable()


def schemes() -> dict[str, Scheme]:
    """Every scheme of every backend by the name that ``--quant`` takes."""
    return {scheme.name: scheme for backend in registered() for scheme in backend.schemes}


def on_load(backends: Sequence[Backend] | None = None) -> list[Scheme]:
    """The schemes by which a model can be quantized on load and run, of these backends; by default of all, installed or not."""
    chosen = registered() if backends is None else backends
    return [s for backend in chosen if not backend.not_on_load() for s in backend.schemes if not s.stored_alone]


def run_here() -> list[str]:
    """The names of these schemes, of the backends whose library is installed here."""
    return [scheme.name for scheme in on_load(available())]


def of_scheme(name: str) -> Backend:
    """The backend that quantizes by the scheme; a ``UsageError`` where none does."""
    for backend in registered():
        if any(scheme.name == name for scheme in backend.schemes):
            return backend
    raise UsageError(f"unknown quantization {name!r}; known: {', '.join(schemes())}")


def of_method(config: Mapping[str, Any]) -> Backend | None:
    """The backend that a ``quantization_config`` (the JSON object) belongs to; None where none knows it."""
    return next((backend for backend in registered() if backend.describes(config)), None)
