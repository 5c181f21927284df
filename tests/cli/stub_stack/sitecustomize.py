"""Puts stubs in the place of the torch side: a worker then starts in a tenth of a second, and the doors can be tested.

On the path of a subprocess, Python imports this by itself.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

STUBS = Path(__file__).parent / "stubs"
NAMES = (
    "torch",
    "kbitcheck_reference",
    "kbitcheck.observe.open_case",
    "kbitcheck.observe.lent",
    "kbitcheck.observe.probes.process_state",
    "kbitcheck.observe.watch.own_steps",
    "kbitcheck.judge",
    "kbitcheck.models.sources.resolve",
    "kbitcheck.models.sources.architecture",
    "kbitcheck.run.selftest",
)


class Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in NAMES:
            return None
        return importlib.util.spec_from_file_location(name, STUBS / f"{name.rpartition('.')[2]}.py")


sys.meta_path.insert(0, Finder)
