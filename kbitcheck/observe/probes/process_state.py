"""The state of the process that a preparation must leave alone: seeds, defaults, modes, filters."""

import builtins
import contextlib
import copy
import copyreg
import functools
import gc
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.utils.data

from kbitcheck.observe import internals
from kbitcheck.observe.library_attributes import attributes, classes_of, replaced
from kbitcheck.observe.probes import files_written
from kbitcheck.observe.probes.prints import printed
from kbitcheck.observe.probes.runtime_settings import loggers, loggers_changed, runtime_settings

# Training draws from these; each probe has its own.
DRAWN_FROM = frozenset({"torch RNG", "CUDA RNG"})
# What importing any library may change.
OF_IMPORTS = frozenset(
    {
        "atexit callbacks", "warnings filters", "import path", "import hooks", "registries of transformers", "pickling",
        "processes started and connections",
    }
)  # fmt: skip
# What that of an implementation may change, too, and a step may not: to silence warnings is done by many a library.
AT_IMPORT = OF_IMPORTS | {"warnings shown"}
THREADS, REACHED = "threads of torch", "processes started and connections"
# The modules whose functions a training step calls.
STEPPED_THROUGH = (
    torch, torch.nn.functional, torch.utils.checkpoint, torch.autograd, torch.autograd.graph, torch.optim, torch.amp,
    torch.random, numpy, numpy.random, builtins, random, time, torch.Tensor, torch.optim.Optimizer,
    torch.amp.GradScaler, torch.autograd.Function, torch.utils.data.DataLoader, copy, copyreg, contextlib, functools, gc, inspect, itertools,
    json, logging, logging.Logger, math, os, pickle, shutil, signal, subprocess, sys, tempfile, threading, threading.Thread, warnings,
)  # fmt: skip


def state() -> dict[str, str]:
    """Text of every process-wide setting that numerics or users depend on."""
    threads = internals.python_threads()
    settings = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn-only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        THREADS: torch.get_num_threads(),
        "torch RNG": _digest(torch.get_rng_state().numpy().tobytes()),
        "CUDA RNG": _digest(b"".join(s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()))
        if torch.cuda.is_initialized()
        else "",
        "numpy RNG": _digest(pickle.dumps(numpy.random.get_state())),
        "random RNG": _digest(repr(random.getstate()).encode()),
        "warnings filters": _digest(repr(warnings.filters).encode()),
        "environment variables": _digest(repr(sorted(os.environ.items())).encode()),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "denormals flushed": float(torch.tensor(1e-40) * 0.5) == 0.0,
        "recursion limit": sys.getrecursionlimit(),
        "hooks on every module": sum(len(hooks) for hooks in internals.GLOBAL_HOOKS),
        "logging": logging.root.manager.disable,
        "registries of transformers": _digest(repr(sorted(internals.registered())).encode()),
        "numpy errors": numpy.geterr(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "working directory": Path.cwd(),
        "import path": _digest(repr(sys.path).encode()),
        "oneDNN": (torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled),
        "float32 precision": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "hooks on every optimizer": sum(len(hooks) for hooks in internals.OPTIMIZER_HOOKS),
        "threads": sorted(thread.name for thread in threads if not _monitors(thread)),
        "signal handlers": {s.name: str(signal.getsignal(s)) for s in signal.Signals},
        "atexit callbacks": internals.exit_callbacks() - sum(map(_monitors, threads)),
        "exception hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "import hooks": (len(sys.meta_path), len(sys.path_hooks)),
        "tracing": (sys.gettrace(), sys.getprofile()),
        "garbage collection's callbacks": len(gc.callbacks),
        REACHED: files_written.reached(),
        "files written": ", ".join(files_written.written()),
        "pickling": sorted(map(str, copyreg.dispatch_table)),
        **runtime_settings(),
    }
    return {name: str(value) for name, value in settings.items()}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Values before and after of each setting that differs, by name; one that is missing is "absent"."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return {n: (str(before.get(n, "absent")), str(after.get(n, "absent"))) for n in sorted(names)}


class Before:
    """The process, and the libraries that a model's steps go through, as they are now."""

    def __init__(self, model: Any) -> None:
        self._state, self._attributes = state(), attributes(of=(*classes_of(model), *STEPPED_THROUGH), libraries=False)
        self._loggers = loggers()

    def changed(self) -> dict[str, tuple[str, str]]:
        """What has changed since; of loggers what those that were there have."""
        settings = {n: values for n, values in changed(self._state, state()).items() if n not in DRAWN_FROM}
        return settings | loggers_changed(self._loggers) | replaced(self._attributes)

    def lasting(self) -> dict[str, tuple[str, str]]:
        """What has changed since, but for what the import of any library may change, and the threads, which kbitcheck sets itself."""
        return {name: values for name, values in self.changed().items() if name not in OF_IMPORTS | {THREADS}}


@contextmanager
def effects(model: Any) -> Iterator[dict[str, tuple[str, str]]]:
    """Fill a dictionary, at the end of the context, with what of the process and the libraries changed meanwhile."""
    happened: dict[str, tuple[str, str]] = {}
    with printed() as texts:
        before = Before(model)
        yield happened
        happened.update(before.changed())
    if text := textwrap.shorten("".join(texts), 60):
        happened["printed"] = ("nothing", text)


def _monitors(thread: threading.Thread) -> bool:
    """Whether it watches progress bars: the first bar of a process starts one, which ends in a callback at exit."""
    return type(thread).__module__.startswith("tqdm.")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
