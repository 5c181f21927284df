"""Exceptions that cross the layers."""

from __future__ import annotations


class NotApplicable(Exception):
    """Raised by a rule that has, for a stated reason, nothing to examine on this case."""


class Unavailable(Exception):
    """A fact that this case cannot give, with the reason; a rule that reads it becomes an ERROR."""


class UsageError(Exception):
    """Wrong input: the message is one line that says what is wrong and what to do (exit code 4)."""


def cause(error: BaseException) -> str:
    """An exception on one line."""
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}".removesuffix(": ")
