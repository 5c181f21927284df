"""Hub ids, ``org/name``, through the ordinary hub cache; what is cached is used without a network."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kbitcheck.core import UsageError
from kbitcheck.models import checkpoint

FILES = ("*.json", "*.safetensors")


def folder(name: str, *, revision: str | None, allow_pickle: bool, code: bool, weights: bool) -> Path:
    """The directory in the hub cache that holds the model's files, fetched where they are not there yet.

    ``code`` fetches Python files too. ``weights`` fetches the weights: safetensors, and a pickle only where there are
    none and pickles are allowed.

    Raises:
        UsageError: there is no such model or revision, it is gated, or there is no network and it is not cached.
    """
    wanted = ["*.json", *(["*.py"] if code else []), *(["*.safetensors"] if weights else [])]
    found = _fetch(name, wanted, revision)
    if weights and allow_pickle and not any(found.glob("*.safetensors")):
        found = _fetch(name, [*wanted, "pytorch_model*.bin"], revision)
    return found


def _fetch(name: str, wanted: list[str], revision: str | None) -> Path:
    import httpx
