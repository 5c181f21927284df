"""What a run ran on: versions, the device, and the processor features that select kernels."""

from __future__ import annotations

import contextlib
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")
DEVICE = re.compile(r"auto|(cpu|cuda|xpu|mps)(:\d+)?")


def validate_device(text: str) -> str:
    """The text itself, where it can name a device.

    Raises:
        UsageError: it cannot.
    """
    if not DEVICE.fullmatch(text):
        raise UsageError(f"no such device: {text!r}; write auto, cpu, cuda, cuda:1, xpu or mps")
    return text


def resolve_device(text: str) -> str:
    """The device that ``text`` names on this machine; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: torch has no such device here.
    """
    import torch

    kind, _, index = validate_device(text).partition(":")
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return kind
    backend = getattr(torch, kind, None)
    count = backend.device_count() if backend is not None and backend.is_available() else 0
    if int(index or 0) >= count:
        raise UsageError(f"no such device here: {text!r}; torch sees {count} of kind {kind}")
    return text


def describe(device: str, seed: int) -> dict[str, Any]:
    """JSON-able facts about this machine and the installed packages. Imports torch, and no other of them."""
    import torch

    kind = device.partition(":")[0]
    backend = getattr(torch, kind)
    named = getattr(backend, "get_device_name", None)
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **versions(),
        "cuda": torch.version.cuda or "",
        "device": device,
        "device_name": named(device) if named is not None else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seed": seed,
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run finds; empty for one that is not installed. Imports none of them."""
    return {package: _version(package) for package in PACKAGES}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
