"""Python's garbage collections, where what they take would count in what is measured."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_kept: list[str] = []  # what this process froze for good


def keep_imports() -> None:
    """What was imported so far stays until the process ends: no collection walks it."""
    gc.freeze()
    _kept.append("imports")


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Garbage collections skip older objects: walking those of torch and transformers takes longest."""
    # Asked first, as to count the frozen walks them all. What others froze, too, would not be frozen any more.
    if _kept or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def collecting_on_request() -> Iterator[None]:
    """Python collects cycles where it is told to alone, so that each step frees them at the same places."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collect_young() -> None:
    """Collect cycles that died young, as Python does by itself every few hundred objects: a full collection walks the model, too."""
    gc.collect(1)
