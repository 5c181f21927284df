"""Exceptions that cross the layers, and what a report says about an exception."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

Short = Literal["", "memory", "time"]
PACKAGES = Path(__file__).parents[1], Path(__file__).parents[2] / "reference"


class NotApplicable(Exception):
    """Raised by a rule that has nothing to examine on this case: the result is a SKIP with this reason."""


class Unavailable(Exception):
    """Raised by a fact that a case does not have; the message is the reason.

    The rule that reads the fact is skipped, because this case cannot tell (a static case takes no steps). With
    ``failed`` the rule is an ERROR, because the case should have had the fact (preparation raised). ``raised`` is the
    exception of the model or of preparation behind the reason.
    """

    def __init__(self, reason: str, *, failed: bool = False, raised: Raised | None = None) -> None:
        super().__init__(reason)
        self.failed, self.raised = failed, raised


class UsageError(Exception):
    """Wrong input: the message is one line that says what is wrong and what to do (exit code 4).

    ``cause`` is the part of the message that says why, where a caller has said the rest.
    """

    def __init__(self, message: str = "", *, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class Lost(Exception):
    """A worker died, hung or broke the protocol; the message is the cause on one line. ``short_of``: what ran out, if anything did."""

    def __init__(self, message: str, *, short_of: Short = "") -> None:
        super().__init__(message)
        self.short_of: Short = short_of


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as facts and reports have it. Two are equal if type and message are, wherever they were raised.

    ``message`` is the first line of ``text``. ``place`` is ``file:line`` of the innermost frame outside kbitcheck; in an installed
    package ``file`` is its path there.
    """

    type: str
    message: str = ""
    place: str = field(default="", compare=False)
    text: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        text = ": ".join(filter(None, (self.type, self.message)))
        return f"{text} ({self.place})" if self.place else text

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """The record of an exception that was caught."""
        text = str(error).strip()
        return cls(type(error).__name__, text.partition("\n")[0].rstrip(), _place(error), text)


def cause(error: BaseException) -> str:
    """An exception on one line: its type, its message, and the innermost place outside kbitcheck."""
    return str(Raised.of(error))


def raised_by(read: Callable[[], object]) -> Raised | None:
    """What reading a fact raised; None where it was read, or where no forward runs, which is reported already."""
    try:
        read()
    except Unavailable as gap:
        return Raised.of(gap) if gap.failed else None
    except Exception as error:
        return Raised.of(error)
    return None


def short_of(error: BaseException) -> Short:
    """``memory`` if an exception, or the one behind a fact that is not there, says that memory ran out; else empty."""
    raised = error.raised if isinstance(error, Unavailable) else Raised.of(error)
    if raised is None:
        return ""
    # torch has a type of its own for an accelerator alone.
    named = raised.type in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in raised.text
    return "memory" if named else ""


def is_own(error: BaseException) -> bool:
    """Whether kbitcheck's own code raised an exception, and no library's or model's."""
    places = traceback.extract_tb(error.__traceback__)
    return bool(places) and any(Path(places[-1].filename).is_relative_to(package) for package in PACKAGES)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    real = [(Path(f.filename), f.lineno) for f in frames if not f.filename.startswith("<")]  # "<frozen importlib...>"
    outside = [frame for frame in real if not any(frame[0].is_relative_to(package) for package in PACKAGES)]
    if not real:
        return ""
    path, line = (outside or real)[-1]
    parts = path.parts
    if "site-packages" in parts:
        return f"{'/'.join(parts[parts.index('site-packages') + 1 :])}:{line}"
    return f"{path.name}:{line}"
