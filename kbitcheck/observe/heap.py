"""The process's heap: what was freed in it goes back to the system only when somebody asks."""

from __future__ import annotations

import ctypes

LARGE_BYTES = 64 << 20  # of a model as loaded: from here on memory, and work in parallel, are worth their price


def give_back() -> None:
    """Return the free pages of the heap; without glibc, nothing.

    Small ones stay where they lie between live ones: after a few models that is a tenth of what there is.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
