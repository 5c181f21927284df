"""For test suites: conformance tests of a preparation function, and assertions on a model that it prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kbitcheck import assert_prepared
from kbitcheck.core.cases import CaseSpec, Checkpointing
from kbitcheck.core.rule import select as selected
from kbitcheck.pytest_plugin.specs import as_spec, item_name
from kbitcheck.run.importable import importable_name
from kbitcheck.run.suites import cases, suite_cells

if TYPE_CHECKING:
    import pytest

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

    ``options`` are the other fields of ``kbitcheck.extend.CaseSpec``.

    Raises:
        UsageError: an option is unknown, or the implementation cannot be imported by another process.
    """
    fields = {"model": model, "quant": quant, "checkpointing": checkpointing, "implementation": implementation}
    return as_spec({"device": "auto", **fields, **options})


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
    """Run a test function once for each rule and case; it requests ``kbit_check`` and calls it.

    ``implementation`` is a name as for ``kbitcheck impl``, or a function that another process can import. The other
    arguments are those of ``kbitcheck.check_implementation``.

    Raises:
        UsageError: an option, rule or implementation is wrong.
    """
    import pytest

    specs = cases(
        suite_cells(suite),
        models=models,
        quants=quants,
        checkpointing=checkpointing,
        implementation=importable_name(implementation),
        **{"device": "auto", **options},
    )
    cells = [
        pytest.param(rule.code, spec, id=item_name(rule, spec), marks=pytest.mark.kbit(rule=rule.code, spec=spec))
        for spec in specs
        for rule in selected(select)
    ]
    return pytest.mark.parametrize(("kbit_check", "kbit_case"), cells, indirect=["kbit_check"])
