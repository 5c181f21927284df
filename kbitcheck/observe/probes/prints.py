"""What is printed meanwhile: texts that code writes to the standard streams of its own accord."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

# What these packages write, users filter, and much of it is said once in a process, whoever causes it.
CHANNELS = frozenset({"logging", "tqdm", "warnings"})


class _Heard:
    """A stream, each text of which is kept."""

    def __init__(self, stream: TextIO, texts: list[str]) -> None:
        self._stream, self._texts = stream, texts

    def write(self, text: str) -> int:
        if not _through_a_channel():
            self._texts.append(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printed() -> Iterator[list[str]]:
    """Fill a list with the texts that Python code writes to standard output and error while the context is open."""
    texts: list[str] = []
    out, error = (_Heard(stream, texts) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(error):
        yield texts


def _through_a_channel() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in CHANNELS:
            return True
        frame = frame.f_back
    return False
