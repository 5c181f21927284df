"""Python imports this before the script of a watched command. A script that imports no quantizer pays nothing more."""

import os
import sys
from pathlib import Path
from typing import Any

OWN = str(Path(__file__).parent)
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
    """Wait for the libraries that the watcher names."""
    import json

    options = json.loads(os.environ[VARIABLE])

    def after(name: str) -> None:
        try:
            sys.path += [path for path in options["paths"] if path not in sys.path]
            from kbitcheck.run import watched_process

            watched_process.imported(options)
        except Exception as error:
            (Path(options["folder"]) / f"failed-{os.getpid()}").write_text(f"{type(error).__name__}: {error}")

    sys.meta_path.insert(0, Finder({*options["libraries"], "transformers.modeling_utils"}, after))


if VARIABLE in os.environ:
    chain()
    arm()
