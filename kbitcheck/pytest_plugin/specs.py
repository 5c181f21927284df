"""Cases as a test module writes them, and names by which another process imports a function."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import Rule


def as_spec(case: CaseSpec | Mapping[str, Any], **defaults: Any) -> CaseSpec:
    """A case from its fields, and ``defaults`` for fields that it leaves out.

    Raises:
        UsageError: a field is unknown or missing.
    """
    if isinstance(case, CaseSpec):
        return case
    fields = {"quant": "nf4", **defaults, **case}
    fields["implementation"] = importable_name(fields.get("implementation") or "")
    try:
        return CaseSpec(**{**fields, "quant": str(Quantization.parse(fields["quant"]))})
    except TypeError as error:
        raise UsageError(f"not a case: {error}") from None


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


def item_name(rule: Rule, spec: CaseSpec) -> str:
    """``KB303-layer-backward-exact[tiny:llama-nf4-reentrant]``."""
    return f"{rule.code}-{rule.name}[{spec.id}]"
