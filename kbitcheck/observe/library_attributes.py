"""Attributes of the classes and modules of the libraries that training rests on, and which of them were replaced."""

import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from kbitcheck.backends import registry

# Counters and caches that classes keep for themselves, and what the standard library writes.
UNWATCHED = frozenset(
    {"__weakref__", "__dict__", "__abstractmethods__", "_abc_impl", "__annotations__", "__slotnames__"}
)
CACHED = "_cached_value"  # what transformers' classes have found out of themselves, such as whether they hold experts


@dataclass(frozen=True, slots=True, eq=False)
class Registry:
    """A dictionary of functions or classes that a library looks up by name, such as its losses and kinds of attention."""

    owner: type | ModuleType
    name: str

    @property
    def entries(self) -> dict[Any, Any]:
        """The dictionary that stands there now."""
        return dict(dict.items(vars(self.owner)[self.name]))


Owner = type | ModuleType | Registry
Attributes = Mapping[Owner, Mapping[Any, Any]]
ABSENT = object()


def _libraries_watched() -> list[str]:
    """Top-level names of the packages that training rests on: the stack and every backend's library."""
    return ["torch", "transformers", "accelerate", "peft", *(backend.name for backend in registry.registered())]


def attributes(*, of: Iterable[type | ModuleType] = (), libraries: bool = True) -> Attributes:
    """The attributes of classes and modules: ``of`` and, with ``libraries``, all of the libraries'; their registries in any case."""
    owners: dict[type | ModuleType, None] = dict.fromkeys(of)
    watched = _libraries_watched()
    modules = [m for n, m in list(sys.modules.items()) if n.split(".")[0] in watched and isinstance(m, ModuleType)]
    if libraries:
        for module in modules:
            owners[module] = None
            for item in list(vars(module).values()):
                if issubclass(type(item), type) and item not in owners and item.__module__.split(".")[0] in watched:
                    owners[item] = None
    registries: dict[int, Registry] = {}  # by identity: modules import each other's
    for module in modules:
        registries |= _registries(module)
    held: dict[Owner, Mapping[Any, Any]] = {
        registry: registry.entries for registry in registries.values() if registry.name in vars(registry.owner)
    }
    return held | {owner: vars(owner).copy() for owner in owners}


@cache
def _registries(module: ModuleType) -> Mapping[int, Registry]:
    """Those of a module and its classes, by identity; none of torch, whose compiler fills its tables of operators as it runs.

    They are read as plain dictionaries: those of transformers import a model for each value that they are asked for.
    """
    if module.__name__.split(".")[0] == "torch":
        return {}
    items = list(vars(module).values())
    own = [item for item in items if issubclass(type(item), type) and item.__module__ == module.__name__]
    return {
        id(value): Registry(owner, name)
        for owner in (module, *own)
        for name, value in list(vars(owner).items())
        if isinstance(value, dict) and not name.startswith("__") and any(map(callable, dict.values(value)))
    }


def _contents(owner: Owner) -> Mapping[Any, Any]:
    return owner.entries if isinstance(owner, Registry) else vars(owner)


def replaced(before: Attributes) -> dict[str, tuple[str, str]]:
    """Attributes that were replaced, removed or added since ``before``, by dotted name: ("original" or "absent", how).

    A function or class that takes the place of another is named. Names that are new in a module are left out, as modules
    resolve their names lazily.
    """
    changed: dict[str, tuple[str, str]] = {}
    for owner, old in before.items():
        new = _contents(owner)
        if len(old) == len(new) and all(map(operator.is_, old.values(), new.values())):
            continue
        then, now = (_watched(owner, attributes) for attributes in (old, new))
        for name in then.keys() | now.keys():
            if name not in then:
                if isinstance(owner, type):
                    changed[f"{_name(owner)}.{name}"] = ("absent", "added")
            elif then[name] is not now.get(name, ABSENT):
                entry = f"[{name!r}]" if isinstance(owner, Registry) else f".{name}"
                changed[f"{_name(owner)}{entry}"] = ("original", _how(now[name]) if name in now else "removed")
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


def _watched(owner: Owner, attributes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Of a module or registry what can be called, of a class all but plain numbers, which are counters; booleans are watched."""
    if isinstance(owner, ModuleType | Registry):
        return {n: a for n, a in attributes.items() if callable(a)}
    return {
        n: a
        for n, a in attributes.items()
        if (n not in UNWATCHED and not isinstance(a, (int, float))) or (isinstance(a, bool) and not n.endswith(CACHED))
    }


def _name(owner: Owner) -> str:
    if isinstance(owner, Registry):
        return f"{_name(owner.owner)}.{owner.name}"
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
