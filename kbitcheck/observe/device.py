"""Devices as torch sees them, and what of a machine selects kernels."""

import platform
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from kbitcheck.core import machine
from kbitcheck.core.errors import UsageError


def resolve_device(text: str) -> str:
    """The device that ``text`` names on this machine: ``auto`` is CUDA if there is one, else the CPU."""
    kind, _, index = machine.validate_device(text).partition(":")
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
    """JSON-able facts about this machine, the installed packages and the device: a report's environment."""
    backend = getattr(torch, device.partition(":")[0])
    name_of = getattr(backend, "get_device_name", None)
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **machine.versions(),
        "device": device,
        "seed": seed,
        "cuda": torch.version.cuda or "",
        "device_name": name_of(device) if name_of is not None else machine.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def capability(device: str) -> tuple[int, int] | None:
    """The compute capability of a CUDA device that is here; None where there is none of that name."""
    return torch.cuda.get_device_capability(device) if device.startswith("cuda") and torch.cuda.is_available() else None


def free_bytes(device: str) -> int:
    """Bytes that are free on a device now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
