"""What of the process a preparation must leave alone: seeds, defaults, modes, filters, class attributes."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import pickle
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy
import torch

LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate")
# Counters and caches that classes keep for themselves, and what the standard library writes.
OWN_BUSINESS = frozenset({"__weakref__", "__dict__", "__abstractmethods__", "_abc_impl", "__annotations__"})

State = Mapping[str, str]

_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global") and isinstance(hooks, dict)
]


def state() -> State:
    """Text of every process-wide setting that numerics or users depend on."""
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": str(torch.is_grad_enabled()),
        "inference mode": str(torch.is_inference_mode_enabled()),
        "anomaly mode": str(torch.is_anomaly_enabled()),
        "autocast": str([(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "deterministic warn-only": str(torch.is_deterministic_algorithms_warn_only_enabled()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": str((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)),
        "threads": str(torch.get_num_threads()),
        "torch RNG": _digest(torch.get_rng_state().numpy().tobytes()),
        "CUDA RNG": _digest(b"".join(s.numpy().tobytes() for s in torch.cuda.get_rng_state_all())) if _cuda() else "",
        "numpy RNG": _digest(pickle.dumps(numpy.random.get_state())),
        "random RNG": _digest(repr(random.getstate()).encode()),
        "warnings filters": _digest(repr(warnings.filters).encode()),
        "environment variables": _digest(repr(sorted(os.environ.items())).encode()),
        "attention kernels": str(
            (
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cuda.math_sdp_enabled(),
            )
        ),
        "denormals flushed": str(float(torch.tensor(1e-40) * 0.5) == 0.0),
        "recursion limit": str(sys.getrecursionlimit()),
        "hooks on every module": str(sum(len(hooks) for hooks in _GLOBAL_HOOKS)),
        "logging": str(
            (logging.root.level, logging.root.manager.disable, [logging.getLogger(n).level for n in LIBRARIES])
        ),
        "registries of transformers": _digest(repr(sorted(_registered())).encode()),
        "numpy errors": str(numpy.geterr()),
        "garbage collection": str((gc.isenabled(), gc.get_threshold())),
        "working directory": str(Path.cwd()),
        "import path": _digest(repr(sys.path).encode()),
        "oneDNN": str((torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled)),
    }


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


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What differs, by name; a name that only appeared counts for classes' attributes and settings alike."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return {n: (str(before.get(n, "absent")), str(after.get(n, "absent"))) for n in sorted(names)}


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


def libraries() -> dict[str, int]:
    """Identity of every attribute of the libraries' classes, and of their functions."""
    return attributes(classes_of_libraries(), functions=True)


def patched_since(before: Mapping[str, int]) -> tuple[str, ...]:
    """What of the ``libraries()`` was replaced or added to; what is gone was a name that a lazy module resolved."""
    return tuple(name for name, (_, how) in patched(before, libraries()).items() if how != "removed")


def _library_modules() -> list[ModuleType]:
    return [m for n, m in list(sys.modules.items()) if n.split(".")[0] in LIBRARIES and isinstance(m, ModuleType)]


REGISTRIES = ("ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "ACT2FN", "ROPE_INIT_FUNCTIONS")


def _registered() -> Iterator[tuple[str, str, int]]:
    """What transformers looks up by name at run time: registry, key and identity of each entry."""
    for place in ("modeling_utils", "masking_utils", "activations", "modeling_rope_utils"):
        for name in REGISTRIES:
            registry = getattr(sys.modules.get(f"transformers.{place}"), name, None)
            for mapping in (
                registry,
                getattr(registry, "_global_mapping", None),
                getattr(registry, "_local_mapping", None),
            ):
                if isinstance(mapping, dict):
                    yield from ((name, str(key), id(value)) for key, value in mapping.items())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
