"""Which tests judge which rule on which case, and the directory that the processes of a test run share."""

import json
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

FOLDER = "kbit_folder"  # in xdist's workerinput
FILE = "plan.json"

Cell: TypeAlias = tuple[str, str]  # rule and case; no case where a fixture decides it when the test runs


@dataclass
class Plan:
    """The cells of the tests by node id, and the cells whose tests were deselected."""

    cells: dict[str, Cell] = field(default_factory=dict)
    deselected: list[Cell] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Leave the plan in the shared directory, for the process that reports."""
        from kbitcheck.report.output_file import replace_file

        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(folder / FILE, json.dumps({"cells": self.cells, "deselected": self.deselected}))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The plan that a process left in the shared directory; None where none did."""
        file = folder / FILE
        if not file.exists():
            return None
        data = json.loads(file.read_text(encoding="utf-8"))
        return cls({nodeid: tuple(cell) for nodeid, cell in data["cells"].items()}, [*map(tuple, data["deselected"])])


def shared_folder(workerinput: Any) -> Path:
    """The directory of this test run: that of xdist's controller, else a new name. It is created when it is needed."""
    return Path(workerinput.get(FOLDER) or Path(tempfile.gettempdir()) / f"kbitcheck-{uuid.uuid4().hex}")
