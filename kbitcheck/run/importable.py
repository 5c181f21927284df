"""The name by which another process imports a function."""

import inspect
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError


def importable_name(implementation: str | Callable[..., Any]) -> str:
    """The name by which another process imports a function: ``module:function``, or ``file.py:function``.

    Raises:
        UsageError: it has none: a lambda, a closure, a partial.
    """
    if isinstance(implementation, str):
        return implementation
    qualified = getattr(implementation, "__qualname__", "<unnamed>")
    module = sys.modules.get(getattr(implementation, "__module__", ""))
    if module is None or "<" in qualified:
        raise UsageError(
            f"{qualified} has no name that another process could import it by: make it a module's function"
        )
    top = module.__name__.partition(".")[0]
    package = PathFinder.find_spec(top, [entry for entry in sys.path if entry])
    file = Path(inspect.getfile(module))
    roots = [*(package.submodule_search_locations or ()), package.origin or ""] if package is not None else []
    if any(root and file.is_relative_to(root) for root in roots):
        return f"{module.__name__}:{qualified}"
    return f"{os.path.relpath(file)}:{qualified}"
