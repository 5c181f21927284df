"""Settings of the interpreter, of the operating system and of torch that a training step has no business to change."""

import faulthandler
import hashlib
import locale
import logging
import multiprocessing
import os
import re
import socket
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy
import torch

from kbitcheck.observe.probes import internals

COMPILER = ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config")
CATEGORIES = (UserWarning, DeprecationWarning, FutureWarning, RuntimeWarning)
NUMBERS = (1 / 3, 1e-6, 1e6)  # whose text shows how numbers are printed


def runtime_settings() -> dict[str, object]:
    """The value of each setting, by name."""
    products = torch.backends.cuda.matmul
    return {
        "printing": (str(torch.tensor(NUMBERS)), str(numpy.array(NUMBERS)), sys.float_repr_style),
        "threads between operators": torch.get_num_interop_threads(),
        "reduced precision": (
            products.allow_bf16_reduced_precision_reduction,
            products.allow_fp16_reduced_precision_reduction,
        ),
        "modes of torch": internals.modes(),
        "defaults of torch's checkpoint": internals.checkpoint_defaults(),
        "compiler": _compiler(),
        "processes": (
            torch.multiprocessing.get_sharing_strategy(),
            multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
        ),
        "interpreter": (sys.getswitchinterval(), sys.get_int_max_str_digits(), faulthandler.is_enabled()),
        "limits and rights": _limits(),
        "locale": locale.setlocale(locale.LC_ALL),
        "standard streams": (sys.stdin, sys.stdout, sys.stderr, sys.displayhook, sys.breakpointhook),
        "sockets": socket.getdefaulttimeout(),
        "warnings shown": {category.__name__: _action(category) for category in CATEGORIES},
    }


def loggers() -> dict[str, str]:
    """What of each logger decides which messages are shown, by its name."""
    unset = logging.Logger("")  # stands where loggers have a common parent that nobody asked for yet
    every = {n: e if isinstance(e, logging.Logger) else unset for n, e in logging.root.manager.loggerDict.items()}
    return {
        name: str((each.level, each.disabled, each.propagate, len(each.handlers), len(each.filters)))
        for name, each in {"root": logging.root, **every}.items()
    }


def loggers_changed(before: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What has changed since of each logger that was there, as ``loggers`` tells it."""
    now = loggers()
    return {f"logger {name}": (was, now[name]) for name, was in before.items() if now.get(name, was) != was}


def _action(category: type[Warning]) -> str:
    """What becomes of a warning whose text and place no filter has in mind."""
    for action, message, kind, module, line in warnings.filters:
        if message is None and module is None and not line and issubclass(category, kind):
            return action
    return "default"


def _limits() -> tuple[object, ...]:
    """Limits of the process, its priority and processors, and the rights of files that it makes."""
    status = Path("/proc/self/status")  # the mask itself can be read by setting it alone
    mask = re.search(r"^Umask:\s*(\d+)", status.read_text(), re.MULTILINE) if status.exists() else None
    seen: list[object] = [mask and mask[1]]
    if sys.platform != "win32":
        import resource

        names = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))
        seen += [(name, resource.getrlimit(getattr(resource, name))) for name in names]
        seen.append(os.getpriority(os.PRIO_PROCESS, 0))
    if hasattr(os, "sched_getaffinity"):
        seen.append(sorted(os.sched_getaffinity(0)))
    return tuple(seen)


@cache
def _compiler_modules() -> tuple[str, ...]:
    """Those that were loaded when this was called first: importing one is no change."""
    return tuple(name for name in COMPILER if name in sys.modules)


def _compiler() -> str:
    settings = [sorted(sys.modules[name].save_config_portable().items()) for name in _compiler_modules()]
    return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()
