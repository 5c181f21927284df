"""For test suites: conformance tests of a preparation function, and assertions on a model that it prepared."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitcheck import assert_prepared
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec, Checkpointing
from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import select as chosen
from kbitcheck.run.suites import FULL, QUICK, cases

if TYPE_CHECKING:
    import pytest

    from kbitcheck.pytest_plugin.options import Settings

__all__ = ["assert_prepared", "case", "parametrize"]


def case(
    implementation: str | Callable[..., Any],
    *,
    model: str,
    quant: str = "nf4",
    checkpointing: Checkpointing = "default",
    **options: Any,
) -> CaseSpec:
    """One case for the fixture ``kbit_case``: a model, how it is quantized, who prepares it, how it is checkpointed.

    ``options`` are the other fields of ``kbitcheck.core.cases.CaseSpec``.

    Raises:
        UsageError: an option is unknown, or the implementation cannot be imported by another process.
    """
    given = {"model": model, "quant": quant, "checkpointing": checkpointing, "implementation": implementation}
    return as_spec({"device": "auto", **given, **options})


def as_spec(given: CaseSpec | Mapping[str, Any], settings: Settings | None = None) -> CaseSpec:
    """A case from its fields; the implementation and device may be left to the options.

    Raises:
        UsageError: a field is unknown or missing.
    """
    if isinstance(given, CaseSpec):
        return given
    fields = {"quant": "nf4", **dict(given)}
    if settings is not None:
        fields = {"implementation": settings.implementation, "device": settings.device, **fields}
    try:
        fields["implementation"] = name_of(fields.get("implementation") or "")
        return CaseSpec(**{**fields, "quant": str(Quantization.parse(fields["quant"]))})
    except TypeError as error:
        raise UsageError(f"not a case: {error}") from None


def parametrize(
    implementation: str | Callable[..., Any],
    *,
    models: Sequence[str] = (),
    quants: Sequence[str] = (),
    checkpointing: Sequence[Checkpointing] = (),
    suite: str = "quick",
    select: Sequence[str] = (),
    **options: Any,
) -> pytest.MarkDecorator:
    """Run a test function once for each rule and case; it takes ``kbit_check`` and calls it.

    ``implementation`` is a name as for ``kbitcheck impl``, or a function that another process can import. The other
    arguments are those of ``kbitcheck.check_implementation``.

    Raises:
        UsageError: an option, rule or implementation is wrong.
    """
    import pytest

    from kbitcheck.pytest_plugin.items import item_name

    specs = cases(
        FULL if suite == "full" else QUICK,
        models=models,
        quants=quants,
        checkpointing=checkpointing,
        implementation=name_of(implementation),
        **{"device": "auto", **options},
    )
    cells = [
        pytest.param(rule.code, spec, id=item_name(rule, spec), marks=pytest.mark.kbit(rule=rule.code, spec=spec))
        for spec in specs
        for rule in chosen(select)
    ]
    return pytest.mark.parametrize(("kbit_check", "kbit_case"), cells, indirect=["kbit_check"])


def name_of(implementation: str | Callable[..., Any]) -> str:
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
    found = PathFinder.find_spec(top, [entry for entry in sys.path if entry])
    file = Path(inspect.getfile(module))
    roots = [*(found.submodule_search_locations or ()), found.origin or ""] if found is not None else []
    if any(root and file.is_relative_to(root) for root in roots):
        return f"{module.__name__}:{qualified}"
    return f"{os.path.relpath(file)}:{qualified}"
