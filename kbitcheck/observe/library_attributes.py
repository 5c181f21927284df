"""Attributes of the classes and modules of the libraries that training rests on, and which of them were replaced."""

import operator
import sys
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from kbitcheck.backends import registry

# Counters and caches that classes keep for themselves, and what the standard library writes.
UNWATCHED = frozenset(
    {"__weakref__", "__dict__", "__abstractmethods__", "_abc_impl", "__annotations__", "__slotnames__"}
)
CACHED = "_cached_value"  # what transformers' classes have found out of themselves, such as whether they hold experts

Attributes = Mapping[type | ModuleType, Mapping[str, Any]]
ABSENT = object()


def _libraries_watched() -> list[str]:
    """Top-level names of the packages that training rests on: the stack and every backend's library."""
    return ["torch", "transformers", "accelerate", *(backend.name for backend in registry.registered())]


def attributes(*, of: Iterable[type | ModuleType] = (), libraries: bool = True) -> Attributes:
    """The attributes of the classes and modules ``of`` and, with ``libraries``, of the libraries' modules and classes."""
    owners: dict[type | ModuleType, None] = dict.fromkeys(of)
    if libraries:
        watched = _libraries_watched()
        modules = [m for n, m in list(sys.modules.items()) if n.split(".")[0] in watched and isinstance(m, ModuleType)]
        for module in modules:
            owners[module] = None
            for item in list(vars(module).values()):
                if issubclass(type(item), type) and item not in owners and item.__module__.split(".")[0] in watched:
                    owners[item] = None
    return {owner: vars(owner).copy() for owner in owners}


def replaced(before: Attributes) -> dict[str, tuple[str, str]]:
    """Attributes that were replaced, removed or added since ``before``, by dotted name: ("original" or "absent", how).

    A function or class that takes the place of another is named. Names that are new in a module are left out, as modules
    resolve their names lazily.
    """
    changed: dict[str, tuple[str, str]] = {}
    for owner, old in before.items():
        new = vars(owner)
        if len(old) == len(new) and all(map(operator.is_, old.values(), new.values())):
            continue
        then, now = (_watched(owner, attributes) for attributes in (old, new))
        for name in then.keys() | now.keys():
            if name not in then:
                if isinstance(owner, type):
                    changed[f"{_name(owner)}.{name}"] = ("absent", "added")
            elif then[name] is not now.get(name, ABSENT):
                changed[f"{_name(owner)}.{name}"] = ("original", _how(now[name]) if name in now else "removed")
    return dict(sorted(changed.items()))


def replaced_at_import(before: Attributes) -> dict[str, tuple[str, str]]:
    """As ``replaced``; a removed one is left out, as lazy modules remove names when they resolve them."""
    return {name: (was, how) for name, (was, how) in replaced(before).items() if how != "removed"}


def _how(now: Any) -> str:
    """That an attribute was replaced, and by what, which says whose doing it is."""
    named = isinstance(now, (FunctionType, BuiltinFunctionType, type))
    return f"replaced by {now.__module__}.{now.__qualname__}" if named else "replaced"


def classes_of(model: Any) -> set[type]:
    """Every class that a module or parameter of the model, or its configuration, is an instance of."""
    types = {type(m) for m in model.modules()} | {type(p) for p in model.parameters()}
    config = getattr(model, "config", None)
    return {c for t in types for c in t.__mro__ if c is not object} | ({type(config)} if config is not None else set())


def _watched(owner: type | ModuleType, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a module what can be called, of a class all but plain numbers, which are counters; booleans are watched."""
    if isinstance(owner, ModuleType):
        return {n: a for n, a in attributes.items() if callable(a)}
    return {
        n: a
        for n, a in attributes.items()
        if (n not in UNWATCHED and not isinstance(a, (int, float))) or (isinstance(a, bool) and not n.endswith(CACHED))
    }


def _name(owner: type | ModuleType) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
