"""Suggestions for misspelt names."""

from collections.abc import Iterable


def did_you_mean(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``" (did you mean NAME?)"`` with the name that has the same letters or the closest; empty where none is close."""
    from difflib import get_close_matches  # every test run would pay for it, and few mistype

    names = list(names)
    swapped = [name for name in names if sorted(name) == sorted(word)]
    close = swapped or get_close_matches(word, names, n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
