"""What classes and functions the libraries that training rests on are made of, and what was replaced in them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate")
# Counters and caches that classes keep for themselves, and what the standard library writes.
OWN_BUSINESS = frozenset({"__weakref__", "__dict__", "__abstractmethods__", "_abc_impl", "__annotations__"})


def classes_of(model: torch.nn.Module) -> set[type]:
    """Every class in the line of any module or parameter of the model."""
    lines = {type(m) for m in model.modules()} | {type(p) for p in model.parameters()}
    config = getattr(model, "config", None)
    return {c for t in lines for c in t.__mro__ if c is not object} | ({type(config)} if config is not None else set())


def classes_of_libraries() -> set[type]:
    """Every class defined in a loaded module of the libraries that training rests on."""
    found = set()
    for module in _library_modules():
        for item in list(vars(module).values()):
            if issubclass(type(item), type) and item.__module__.split(".")[0] in LIBRARIES:
                found.add(item)
    return found


def attributes(classes: Iterable[type], *, functions: bool = False) -> dict[str, int]:
    """Identity of each attribute of the classes and, with ``functions``, of the libraries' module-level functions."""
    seen = {
        f"{cls.__module__}.{cls.__qualname__}.{name}": id(item)
        for cls in classes
        for name, item in list(vars(cls).items())
        if (name not in OWN_BUSINESS and not isinstance(item, (int, float))) or isinstance(item, bool)
    }
    if functions:
        for module in _library_modules():
            for name, item in list(vars(module).items()):
                if issubclass(type(item), (FunctionType, BuiltinFunctionType, type)):
                    seen[f"{module.__name__}.{name}"] = id(item)
    return seen


def patched(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[str, str]]:
    """Attributes that were replaced, removed or added on a class that existed before."""
    owners = {name.rpartition(".")[0] for name in before}
    found = {}
    for name in sorted({**before, **after}):
        if before.get(name) != after.get(name) and name.rpartition(".")[0] in owners:
            new = name not in before
            # Modules resolve names lazily, so only what stood there before counts; a class gets no new names.
            if new and name.rpartition(".")[0] in sys.modules:
                continue
            found[name] = (
                "absent" if new else "original",
                "added" if new else "replaced" if name in after else "removed",
            )
    return found


def fingerprint() -> dict[str, int]:
    """Identity of every attribute of the libraries' classes, and of their functions."""
    return attributes(classes_of_libraries(), functions=True)


def patched_since(before: Mapping[str, int]) -> tuple[str, ...]:
    """What of the ``fingerprint()`` was replaced or added to; what is gone was a name that a lazy module resolved."""
    return tuple(name for name, (_, how) in patched(before, fingerprint()).items() if how != "removed")


def _library_modules() -> list[ModuleType]:
    return [m for n, m in list(sys.modules.items()) if n.split(".")[0] in LIBRARIES and isinstance(m, ModuleType)]
