"""What Python code of this process has done outside of it: files and folders written, but for temporary ones and caches; processes
started, and connections opened.
"""

import os
import sys
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# An event of the interpreter, and which of its arguments is the path that comes to be.
MADE = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1}
TEMPORARY = ("tempfile.mkstemp", "tempfile.mkdtemp")
# Events of what is started or reached, and what they are called here.
REACHED = {
    "subprocess.Popen": "a process", "os.system": "a process", "os.posix_spawn": "a process", "os.exec": "a process",
    "os.fork": "a process", "socket.connect": "a connection", "socket.sendto": "a message", "socket.sendmsg": "a message",
}  # fmt: skip
HEARD = frozenset({"open", *MADE, *TEMPORARY, *REACHED})
CACHES = {".cache", ".triton", "__pycache__"}
SYSTEM = ("/dev/", "/proc/", "/sys/")

_written: dict[str, None] = {}
_temporary: set[str] = set()
_reached: Counter[str] = Counter()


def written() -> list[str]:
    """Absolute paths of what was written since ``watch`` was called and is still there, sorted; none where it was not."""
    for path in [*_written]:
        if not Path(path).exists():
            _written.pop(path, None)
    return sorted(_written)


def reached() -> dict[str, int]:
    """How many processes were started, and how often others were reached, since ``watch`` was called."""
    return dict(sorted(_reached.items()))


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
    elif event in REACHED:
        _reached[REACHED[event]] += 1
    elif event in TEMPORARY:
        _temporary.add(str(arguments[0]))


def _writes(mode: str | None, flags: int | None) -> bool:
    return any(letter in "wax+" for letter in mode) if mode else bool((flags or 0) & WRITING)


def _note(path: Any) -> None:
    full = Path.cwd() / os.fsdecode(path)
    within = {str(folder) for folder in (full, *full.parents)}
    if not str(full).startswith(SYSTEM) and CACHES.isdisjoint(full.parts) and _temporary.isdisjoint(within):
        _written[str(full)] = None
