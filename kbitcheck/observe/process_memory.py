"""Memory that a process has freed, and from what size of model on it is worth its price."""

from __future__ import annotations

import ctypes

LARGE_BYTES = 64 << 20  # of a model as loaded: from here on saving memory, and several threads, are worth their price


def return_free_pages() -> None:
    """Return the free pages of the heap to the system, which glibc does only on request; without glibc, do nothing.

    Small ones stay where they lie between live ones: after a few models that is a tenth of the memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
