"""Quantization backends, one file each: how to recognise a quantized layer and read what it holds."""

from __future__ import annotations

from kbitcheck.backends import bitsandbytes
from kbitcheck.backends.bitsandbytes import (
    bare,
    compute_dtype,
    dequantized,
    is_packed,
    is_quantized,
    kind,
    rounded_input,
    scratch,
    shape,
    state,
    state_dtype,
)

__all__ = [
    "bare",
    "bitsandbytes",
    "compute_dtype",
    "dequantized",
    "is_packed",
    "is_quantized",
    "kind",
    "rounded_input",
    "scratch",
    "shape",
    "state",
    "state_dtype",
]
