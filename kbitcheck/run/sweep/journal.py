"""Rows on disk as they come. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kbitcheck.compare.sweep import Row


class Journal:
    """Rows on disk as they come, so that the same sweep can go on where it was interrupted.

    A JSON-lines file: what the rows depend on, then a row a line. One that was written under other options or versions is
    started anew.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path = path
        self.rows: dict[str, Row] = {}
        self.stale = False
        if path is None:
            return
        header = json.dumps({"key": key}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.stale = bool(lines) and lines[0] != header
        if not lines or self.stale:
            path.write_text(header + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last one may have been cut short
                kept = Row.from_json(json.loads(line))
                self.rows[kept.architecture] = kept
        whole = [header, *(json.dumps(r.as_json()) for r in self.rows.values())]
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def add(self, done: Row) -> None:
        """Keep a row, on disk before this returns."""
        self.rows[done.architecture] = done
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done.as_json()) + "\n")
                file.flush()
                os.fsync(file.fileno())
