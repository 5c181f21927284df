"""What of the process a preparation must leave alone: seeds, defaults, modes, filters."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import pickle
import random
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from kbitcheck.observe import internals
from kbitcheck.observe.library_attributes import libraries_watched

State = Mapping[str, str]


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
        "hooks on every module": str(sum(len(hooks) for hooks in internals.GLOBAL_HOOKS)),
        "logging": str(
            (
                logging.root.level,
                logging.root.manager.disable,
                [logging.getLogger(n).level for n in libraries_watched()],
            )
        ),
        "registries of transformers": _digest(repr(sorted(internals.registered())).encode()),
        "numpy errors": str(numpy.geterr()),
        "garbage collection": str((gc.isenabled(), gc.get_threshold())),
        "working directory": str(Path.cwd()),
        "import path": _digest(repr(sys.path).encode()),
        "oneDNN": str((torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled)),
    }


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What differs, by name; a name that only appeared counts for classes' attributes and settings alike."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return {n: (str(before.get(n, "absent")), str(after.get(n, "absent"))) for n in sorted(names)}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
