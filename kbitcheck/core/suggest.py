"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``" (did you mean NAME?)"`` with the name closest to ``word``; empty where none is close."""
    close = get_close_matches(word, list(names), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
