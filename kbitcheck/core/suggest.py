"""Suggestions for misspelt names."""

from collections.abc import Iterable


def did_you_mean(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``" (did you mean NAME?)"`` with the name closest to ``word``; empty where none is close."""
    from difflib import get_close_matches  # every test run would pay for it, and few mistype

    close = get_close_matches(word, list(names), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
