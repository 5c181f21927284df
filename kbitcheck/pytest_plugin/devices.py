"""Which GPU a pytest-xdist worker takes. Counted without torch."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS = 20.0


def visible(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The CUDA devices that this process may use, by the numbers or names that ``CUDA_VISIBLE_DEVICES`` takes."""
    if VISIBLE in environment:
        named = [name.strip() for name in environment[VISIBLE].split(",")]
        # As CUDA reads it: what comes after a name that is none is not seen.
        end = next((i for i, name in enumerate(named) if not name or name.startswith("-")), len(named))
        return named[:end]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"],  # noqa: S607  (wherever the driver put it)
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def environment_of(worker: str, device: str, devices: Sequence[str]) -> dict[str, str]:
    """Variables with which worker ``gw3`` sees the fourth device alone, or another one where there are fewer.

    Empty where the user named a device, or there is none.
    """
    number = re.search(r"\d+$", worker)
    if device not in ("auto", "cuda") or not devices or number is None:
        return {}
    return {VISIBLE: devices[int(number[0]) % len(devices)]}
