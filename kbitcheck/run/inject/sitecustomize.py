"""Python imports this before the script of a watched command. A script that imports no quantizer pays nothing more."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes longer to import than the rest of this file
    from typing import Any

OWN = __file__.rpartition(os.sep)[0]  # without pathlib, which takes long to import
VARIABLE = "KBITCHECK_WATCH"


def chain() -> None:
    """Import the ``sitecustomize`` that this one hides, if there is one."""
    own, paths = sys.modules.pop("sitecustomize", None), list(sys.path)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != OWN]
    try:
        __import__("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if own is not None:
            sys.modules.setdefault("sitecustomize", own)
        added = [path for path in sys.path if path not in paths]
        sys.path[:] = [path for path in paths if os.path.realpath(path or ".") != OWN] + added


class Finder:
    """Finds nothing itself; calls ``after`` with the name of a module of ``names`` when that has been imported."""

    def __init__(self, names: set[str], after: Any) -> None:
        self.names, self.after = names, after

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.names:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if name in self.names:  # who asks whether a module is there only finds it, and imports it later or never
                self.names.discard(name)
                self.after(name)

        loader.exec_module = exec_module
        return spec


def arm() -> None:
    """Wait for torch, then for the quantizers' libraries, and for transformers' models."""
    text = os.environ[VARIABLE]
    options: dict[str, Any] = {}

    def after(name: str) -> None:
        import json

        options.update(options or json.loads(text))
        try:
            sys.path += [path for path in options["paths"] if path not in sys.path]
            if name == "torch":
                from kbitcheck.backends.registry import libraries

                options["libraries"] = sorted(libraries())
                finder.names |= {each for each in options["libraries"] if each not in sys.modules}
            if "libraries" in options and all(each in sys.modules for each in options["libraries"]):
                from kbitcheck.run import watched_process

                watched_process.imported(options)
        except Exception as error:
            from pathlib import Path

            (Path(options["folder"]) / f"failed-{os.getpid()}").write_text(f"{type(error).__name__}: {error}")

    finder = Finder({"torch", "transformers.modeling_utils"}, after)
    sys.meta_path.insert(0, finder)


if VARIABLE in os.environ:
    chain()
    arm()
