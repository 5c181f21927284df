"""What can be said of a machine without torch: versions, the processor, names of devices."""

import contextlib
import ctypes
import platform
import re
from importlib import metadata
from pathlib import Path

from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")
DEVICE = re.compile(r"auto|(cpu|cuda|xpu|mps)(:\d+)?")
LARGE_BYTES = 64 << 20  # of a model as loaded: from here on saving memory, and several threads, are worth their price

# Variables of a worker's environment, by which it could be recognised.
WORKER = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "PYTHONUNBUFFERED": "1",  # or last words are lost
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait stall every other process
    # glibc returns a weight's memory when it is freed, and keeps that of activations: page faults of every tensor of a step
    # took a quarter of an audit's time. At 3 MiB an int8 audit of 135M takes a sixth less memory, three times the faults and a
    # tenth more time.
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
# Those without which other kernels run.
SAME_KERNELS = {"TORCHDYNAMO_DISABLE": "1"}  # bitsandbytes compiles a kernel for each odd shape: half a minute a case


def validate_device(text: str) -> str:
    """The text itself; a ``UsageError`` where it cannot name a device."""
    if not DEVICE.fullmatch(text):
        hint = did_you_mean(text, ("auto", "cpu", "cuda", "xpu", "mps"))
        raise UsageError(f"no such device: {text!r}{hint}; write auto, cpu, cuda, cuda:1, xpu or mps")
    return text


def return_free_pages() -> None:
    """Return the free pages of the heap to the system, which glibc does only on request; without glibc, do nothing.

    Small ones stay where they lie between live ones: after a few models that is a tenth of the memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on; empty for one that is not installed. Imports none of them."""
    return {package: version(package) for package in PACKAGES}


def version(package: str) -> str:
    """The version of an installed package; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
