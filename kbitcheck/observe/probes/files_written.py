"""Files and folders that Python code of this process has written, outside of temporary files and of caches."""

import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# An event of the interpreter, and which of its arguments is the path that comes to be.
MADE = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1}
TEMPORARY = ("tempfile.mkstemp", "tempfile.mkdtemp")
HEARD = frozenset({"open", *MADE, *TEMPORARY})
CACHES = {".cache", ".triton", "__pycache__"}
SYSTEM = ("/dev/", "/proc/", "/sys/")

_written: dict[str, None] = {}
_temporary: set[str] = set()


def written() -> list[str]:
    """Absolute paths of what was written since ``watch`` was called and is still there, sorted; none where it was not."""
    for path in [*_written]:
        if not Path(path).exists():
            _written.pop(path, None)
    return sorted(_written)


@cache
def watch() -> None:
    """Watch from now on, and to the end of the process: such a hook cannot be removed, and each call of ``id`` takes longer.

    So it is for processes of kbitcheck's own, and not for a user's.
    """
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event in HEARD:  # ``id`` alone is an event, and a copy of a model calls it hundreds of thousands of times
        # What it raises would be raised where the file is opened.
        with suppress(Exception):
            _hear(event, arguments)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, mode, flags = arguments
        if _writes(mode, flags) and not isinstance(path, int) and not os.path.isdir(path):  # noqa: PTH112
            _note(path)
    elif event in MADE:
        _note(arguments[MADE[event]])
    elif event in TEMPORARY:
        _temporary.add(str(arguments[0]))


def _writes(mode: str | None, flags: int | None) -> bool:
    return any(letter in "wax+" for letter in mode) if mode else bool((flags or 0) & WRITING)


def _note(path: Any) -> None:
    full = Path.cwd() / os.fsdecode(path)
    within = {str(folder) for folder in (full, *full.parents)}
    if not str(full).startswith(SYSTEM) and CACHES.isdisjoint(full.parts) and _temporary.isdisjoint(within):
        _written[str(full)] = None
