"""Where a report is written: stdout, or a file that is replaced as a whole or not at all."""

import os
import sys
import tempfile
from pathlib import Path

from kbitcheck.core.errors import UsageError


class OutputFile:
    """Stdout, or the file named by an option.

    Raises:
        UsageError: the file cannot be written; raised before anything is run.
    """

    def __init__(self, name: str, option: str = "--output") -> None:
        # A link stays a link: its target is replaced.
        self._path = Path(os.path.realpath(name)) if name else None
        self._name = f"{option} {name}" if name else "the report to stdout"
        if self._path is None:
            return
        if self._path.is_dir():
            raise UsageError(f"cannot write {self._name}: it is a directory")
        try:
            if self._plain(self._path):
                _draft(self._path.parent).unlink()
        except OSError as error:
            raise UsageError(f"cannot write {self._name}: {error.strerror}") from None

    @property
    def terminal(self) -> bool:
        """Whether the text goes to a terminal."""
        return self._path is None and sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Write the whole text.

        Raises:
            UsageError: it cannot be written: the disk is full, or the directory is gone.
        """
        try:
            if self._path is None:
                self._print(text)
            elif self._plain(self._path):
                replace_file(self._path, text)
            else:
                self._path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {self._name}: {error.strerror}") from None

    @staticmethod
    def _print(text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            # Otherwise the interpreter flushes again when it ends, and complains.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # A reader that closed the pipe (head, less) has read enough.
            if not isinstance(error, BrokenPipeError):
                raise

    @staticmethod
    def _plain(path: Path) -> bool:
        return path.is_file() or not path.exists()


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part; its permissions stay."""
    draft = _draft(path.parent)
    try:
        draft.write_text(text, encoding="utf-8")
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _draft(directory: Path) -> Path:
    descriptor, draft = tempfile.mkstemp(prefix=".kbitcheck-", dir=directory)
    os.close(descriptor)
    return Path(draft)
