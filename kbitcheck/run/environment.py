"""What a report of a defect needs to say of a machine: versions, processor, memory, devices, quantizers. Imports no torch."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from kbitcheck.backends import registry
from kbitcheck.core import machine
from kbitcheck.core.memory_sizes import GIB
from kbitcheck.core.version import VERSION

OTHERS = ("safetensors", "tokenizers", "trl", "pytest", "pytest-xdist", "hypothesis", "matplotlib")
# Other kernels run with them, in torch or in a quantizer's library.
FEATURES = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCHDYNAMO_DISABLE",
)  # fmt: skip
QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader")


def environment() -> dict[str, Any]:
    """What is installed and what the machine has, as JSON."""
    packages = (*machine.PACKAGES, *(library for b in registry.registered() for library in b.libraries), *OTHERS)
    return {
        "kbitcheck": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: machine.version(name) for name in dict.fromkeys(packages)},
        "processor": machine.processor(),
        "processor_features": [name for name in FEATURES if name in _flags()],
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "devices": _devices(),
        "quantizers": {backend.name: backend.unavailable() or "" for backend in registry.registered()},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def lines(values: Mapping[str, Any]) -> list[str]:
    """The same as lines of text."""
    packages = [f"{name} {version}" for name, version in values["packages"].items() if version]
    absent = [name for name in machine.PACKAGES if not values["packages"][name]]
    quantizers = [f"{name} ({why})" if why else name for name, why in values["quantizers"].items()]
    features = " ".join(values["processor_features"]) or "no feature that matters here"
    rows = {
        "kbitcheck": values["kbitcheck"],
        "python": f"{values['python']}, {values['platform']}",
        "packages": ", ".join(packages),
        "not installed": ", ".join(absent),
        "processor": f"{values['processor']}, {values['cores']} cores: {features}",
        "memory": f"{values['memory_gib']} GiB",
        "devices": "; ".join(values["devices"]) or "no GPU",
        "quantizers": ", ".join(quantizers),
        "variables": " ".join(f"{name}={value}" for name, value in values["variables"].items()),
    }
    return [f"{name:<14} {value}" for name, value in rows.items() if value]


def _flags() -> set[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    return set()


def _devices() -> list[str]:
    """NVIDIA's GPUs as their driver lists them; it is asked, as torch takes seconds to import."""
    if shutil.which(QUERY[0]) is None:
        return []
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=20, check=True)
        return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return ["nvidia-smi does not answer"]
