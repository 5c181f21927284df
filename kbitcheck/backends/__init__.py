"""Quantization backends: how to recognise a quantized layer and read what it holds. Importing this imports no torch."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from kbitcheck.backends.bitsandbytes import layers

    return getattr(layers, name)
